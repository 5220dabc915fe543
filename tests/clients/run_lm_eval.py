"""lm_eval, unmodified, against a server of the demo model: its log-likelihoods beside those of transformers.

    python -m venv LM && LM/bin/pip install 'lm_eval[api]' transformers      # without torch
    python tests/clients/run_lm_eval.py LM/bin/python

Multiple-choice questions of a local file go through `local-completions` (echo and logprobs), and a chat that is to be
answered at length through `local-chat-completions`. The last line of stdout is JSON; exit code 1 when a choice's
log-likelihood is further than 1e-3 from what transformers computes in fp32, or a greedy flag differs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

MODEL = HERE.parent.parent / "experiments" / "models" / "demo"
KEY = "k"
TOLERANCE = 1e-3
QUESTIONS = [
    {"question": f"Question {number}: what does the function return?", "choices": choices, "answer": number % 3}
    for number, choices in enumerate(
        [["the list of values", "a number", "nothing"], ["an error", "the name of the file", "text"],
         ["the first item", "true", "a new object"], ["its argument", "the time", "a string of bytes"]]
    )
]  # fmt: skip
CHOICES = """task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
SAID = """task: local_said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["never said"], max_gen_toks: 16, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(python: str, url: str, folder: Path, model: str, path: str, task: str, *more: str) -> list[dict[str, Any]]:
    """Run a task; what it logged of each question."""
    args = f"model=demo,base_url={url}{path},num_concurrent=4,tokenizer={MODEL},tokenized_requests=False"
    command = [python, "-m", "lm_eval", "run", "--model", model, "--model_args", args, "--tasks", task]
    command += ["--include_path", str(folder), "--output_path", str(folder / task), "--log_samples", *more]
    env = os.environ | {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    [found] = (folder / task).rglob("samples_*.jsonl")
    return [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]


def reference() -> list[list[tuple[float, bool]]]:
    """Of each question's choices: the log-likelihood, and whether greedy decoding says it; transformers, fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    rows = []
    for one in QUESTIONS:
        row = []
        for choice in one["choices"]:
            ids = tokenizer(f"{one['question']} {choice}").input_ids
            start = len(tokenizer(one["question"]).input_ids)
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)[start - 1 : -1]
            goal = torch.tensor(ids[start:])
            said = scores.gather(1, goal[:, None]).sum()
            row.append((float(said), bool((scores.argmax(dim=1) == goal).all())))
        rows.append(row)
    return rows


def main(python: str) -> int:
    """Returns the exit code."""
    from kvarena.experiments.serving.child import Server

    server = Server([str(MODEL), "--max-model-len", "512", "--dtype", "float32", "--served-model-name", "demo"], KEY)
    try:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            file = folder / "questions.jsonl"
            file.write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS), encoding="utf-8")
            (folder / "choices.yaml").write_text(CHOICES.format(file=file), encoding="utf-8")
            (folder / "said.yaml").write_text(SAID.format(file=file), encoding="utf-8")
            completions = evaluate(python, server.url, folder, "local-completions", "/v1/completions", "local_choices")
            said = evaluate(
                python, server.url, folder, "local-chat-completions", "/v1/chat/completions", "local_said",
                "--apply_chat_template",
            )  # fmt: skip
    finally:
        server.stop()
    expected = reference()
    apart, flags = 0.0, 0
    for sample in completions:
        for (value, is_greedy), (goal, is_said) in zip(
            sample["filtered_resps"], expected[sample["doc_id"]], strict=True
        ):
            apart = max(apart, abs(float(value) - goal))
            flags += str(is_greedy) != str(is_said)
    answered = sum(bool(sample["resps"][0][0]) for sample in said)
    line = {"choices": sum(map(len, expected)), "largest_difference": apart, "greedy_flags_that_differ": flags}
    print(json.dumps(line | {"chats": len(QUESTIONS), "answered": answered}))
    return int(apart > TOLERANCE or flags > 0 or answered < len(QUESTIONS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
