"""Names of the files in a run folder and a sweep folder; docs/files.md says what they hold."""

MANIFEST_FILE = "manifest.json"
REQUESTS_FILE = "requests.parquet"
STEPS_FILE = "steps.parquet"
ERROR_FILE = "error.json"
OVERRIDES_FILE = ".hydra/overrides.yaml"
STUDY_FILE = "study.json"
SWEEP_FILE = "sweep.json"
