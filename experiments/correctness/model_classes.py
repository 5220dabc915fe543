"""Every causal language model class of transformers: the engine's greedy tokens are transformers' own, or it refuses.

    kvarena check model_classes [--jobs 2] [--only llama ...] [--write docs/models.md]

Of each class a small random checkpoint (`small_configs.py`) is written, loaded as any other, and run in fp32 in three
settings: `paged x continuous` in a pool that preempts, `contiguous x static`, `paged_prefix x chunked` with prompts
that share a prefix. Prompts are longer than every window and attention chunk. A model that limits its context below the
prompts is run once more with a chunk that reaches over them. Prints a line of JSON for each class; exit code 1 when
tokens differ.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from kvarena.engine.core import run_to_completion
from kvarena.engine.errors import KvarenaError, ModelError, RequestRejected
from kvarena.engine.models.configs import quiet_transformers
from kvarena.engine.request import Request, SamplingParams
from kvarena.experiments.building.build import build_engine, load_shared
from kvarena.experiments.building.shared import SharedParts
from kvarena.experiments.correctness.class_table import Outcome, write_table
from kvarena.experiments.correctness.reference import greedy_reference
from kvarena.experiments.correctness.small_configs import VOCAB_SIZE, class_names, small_config
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.settings.config import RunConfig
from kvarena.experiments.tools import tool_parser
from kvarena.reports.reading.names import cell_name

NUM_TOKENS, MAX_LEN = 12, 64
PROMPT_LENS, NUM_SHARED = (30, 13, 21, 40), 10
STDS, LEAST_TOKENS = (0.15, 0.4, 1.0), 8  # the first whose reference has so many distinct tokens
MOST_PARAMETERS = 60_000_000  # above it the class has sizes that no config field makes small


COMMON = (
    "model=path", "model.name=it", "engine.device=cpu", "engine.dtype=float32", "allocator.block_size=4",
    "scheduler.max_num_seqs=8", "scheduler.max_num_batched_tokens=256",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A strategy, and further settings; the pool's size among them."""

    allocator: str
    scheduler: str
    more: tuple[str, ...]

    def __str__(self) -> str:
        return cell_name(self.allocator, self.scheduler)


SETTINGS = (
    Setting("paged", "continuous", ("kv_cache.num_slots=72",)),  # two of the four requests fit at their ends
    Setting("contiguous", "static", (f"kv_cache.num_slots={4 * MAX_LEN}", "runner.layout=contiguous")),
    Setting("paged_prefix", "chunked", ("kv_cache.num_slots=400", "scheduler.max_num_batched_tokens=16")),
)


class Checkpoint:
    """A small checkpoint, and the model that it held when it was first read."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._shared = SharedParts()
        self.spec = load_shared(self._config(SETTINGS[0], None), self._shared)[0].spec

    def _config(self, setting: Setting, max_len: int | None) -> RunConfig:
        config = _composed(setting, max_len)
        return replace(config, model=replace(config.model, path=self._folder))

    def run(self, setting: Setting) -> list[Request]:
        """The requests, run to their ends. Raises RequestRejected when they are longer than the model's context."""
        config = self._config(setting, min(self.spec.max_model_len, MAX_LEN))
        requests = [Request(f"r{i}", row, SamplingParams(max_tokens=NUM_TOKENS)) for i, row in enumerate(prompts())]
        run_to_completion(build_engine(config, self._shared).engine, requests)
        return requests


@cache
def _composed(setting: Setting, max_len: int | None) -> RunConfig:
    """Of any checkpoint: to compose takes as long as to run one."""
    length = "null" if max_len is None else max_len
    names = (f"allocator={setting.allocator}", f"scheduler={setting.scheduler}", f"engine.max_model_len={length}")
    return load_run([*names, *COMMON, *setting.more])


def check_class(model_type: str, name: str | None = None) -> Outcome:
    """Write, load and run the small checkpoint of a model type."""
    outcome = Outcome(name or model_type, model_type, "equal")
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            write_small(small_config(model_type), folder)
        # Anything: config and model classes check themselves in many ways.
        except Exception as error:
            return replace(outcome, result="not made", why=_line(error))
        try:
            checkpoint = Checkpoint(folder)
        except KvarenaError as error:
            return replace(outcome, result="refused", why=_line(error).replace(folder, "it"))
        # Anything: what is not a line of the engine's own is a fault of it.
        except Exception as error:
            return replace(outcome, result="different", why=f"loading fails with {_line(error)}")
        return _check_loaded(outcome, checkpoint, folder)


def write_small(config: PretrainedConfig, folder: str, std: float = STDS[0]) -> None:
    """Write a random checkpoint.

    Args:
        config: a small one.
        folder: where to.
        std: of matrices; so large that logits are far apart. Vectors (norms, sinks) are moved by 0.05.

    Raises:
        ModelError: it has too many parameters to be a small one.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ModelError(f"its config cannot be made small: {size:,} parameters")
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    module.save_pretrained(folder)


def _check_loaded(outcome: Outcome, checkpoint: Checkpoint, folder: str) -> Outcome:
    config = small_config(outcome.model_type)
    try:
        checkpoint.run(SETTINGS[0])
    except RequestRejected as error:
        outcome = replace(outcome, why=f"within {checkpoint.spec.max_model_len} tokens; beyond them {_line(error)}")
        config.get_text_config().attention_chunk_size = MAX_LEN
    for std in STDS:
        write_small(config, folder, std)
        try:
            expected = greedy_reference(folder, prompts(), NUM_TOKENS)
        # Anything: some classes cannot generate at all.
        except Exception as error:
            return replace(outcome, result="not made", why=f"transformers' own generate fails: {_line(error)}")
        outcome = replace(outcome, num_tokens=len({token for row in expected for token in row}))
        if outcome.num_tokens >= LEAST_TOKENS:
            break
    if outcome.num_tokens < LEAST_TOKENS:
        few = f"its tokens are few: {outcome.num_tokens} distinct ones"
        outcome = replace(outcome, why=f"{outcome.why}; {few}" if outcome.why else few)
    checkpoint = Checkpoint(folder)
    for setting in SETTINGS:
        requests = checkpoint.run(setting)
        if setting is SETTINGS[0] and not any(req.num_preemptions for req in requests):
            return replace(outcome, result="different", why=f"{setting}: nothing was preempted")
        if [req.output_token_ids for req in requests] != expected:
            return replace(outcome, result="different", why=f"{setting}: other tokens than transformers")
    return outcome


def prompts() -> list[list[int]]:
    """Prompts that share their first tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENS]
    return [rows[0][:NUM_SHARED] + row[NUM_SHARED:] for row in rows]


def check_classes(names: dict[str, str], jobs: int) -> list[Outcome]:
    """Check classes (name -> model type) in so many processes; each outcome is printed as it comes."""
    outcomes = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), initializer=torch.set_num_threads,
                             initargs=(1,)) as pool:  # fmt: skip
        for outcome in pool.map(check_class, names.values(), names.keys()):
            print(json.dumps(asdict(outcome)), flush=True)
            outcomes.append(outcome)
    return outcomes


def _line(error: BaseException) -> str:
    """The error's first lines as one."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, KvarenaError) else f"{type(error).__name__}: {text[:160]}"


def main(argv: Sequence[str]) -> int:
    """Check and print; returns the exit code."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", nargs="+", default=None, help="model types or classes")
    parser.add_argument("--write", type=Path, default=None, help="write the table of all classes to this page")
    args = parser.parse_args(argv)
    names = class_names()
    if args.only is not None:
        known = {*names, *names.values()}
        if unknown := sorted(set(args.only) - known):
            parser.error(f"--only: {', '.join(unknown)} is no causal language model of transformers")
        if args.write is not None:
            parser.error("--write makes the table of all classes; leave out --only")
        names = {name: kind for name, kind in names.items() if {name, kind} & set(args.only)}
    outcomes = check_classes(names, args.jobs)
    if args.write is not None:
        write_table(args.write, outcomes)
    return 1 if any(outcome.result == "different" for outcome in outcomes) else 0
