"""Makes a profile for the simulator from AIConfigurator's published tables of single operations (Apache-2.0).

    pip download --no-deps aiconfigurator-core==0.12.0
    kvarena make profile aiconfigurator_core-0.12.0-*.whl --system h200_sxm --framework sglang --out h200-tables.yaml

Writes FILE.yaml, which `runner.profile=FILE.yaml` takes, and FILE.parquet beside it: matrix products in bf16, attention
over a KV cache in bf16, experts, and from the same tables what all-reduces of 2, 4 and 8 cards take, in a CUDA graph or
by NCCL, whichever is faster. Nothing is computed and no GPU is needed.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from kvarena.engine.errors import ConfigError
from kvarena.experiments.simulation.operation_tables import COLUMNS
from kvarena.experiments.tools import tool_parser

PACKAGE = "aiconfigurator_core"
OPS = ("gemm", "context", "generation", "experts")
FILL = 132 * 128  # queries of one head: processors of a Hopper card x rows of a tile
HOST = {"before": 5.0e-4, "before_per_request": 1.0e-6, "after": 1.0e-4, "after_per_request": 1.0e-6}


class Source:
    """Files of the package: of a wheel, of a folder, or as it is installed.

    Args:
        place: a wheel or a folder that holds `systems`; None: the installed package.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, place: Path | None) -> None:
        if place is None:
            spec = find_spec(PACKAGE)
            if spec is None or not spec.submodule_search_locations:
                raise ConfigError(
                    f"{PACKAGE} is not installed; give its wheel (pip download --no-deps aiconfigurator-core)"
                )
            place = Path(next(iter(spec.submodule_search_locations)))
        found = re.match(r"(.+?)-(\d[\w.]*)-", place.name)  # of a wheel
        self.name = f"{found[1].replace('_', '-')} {found[2]}" if found else place.name
        self._read: Callable[[str], bytes]
        if place.is_file():
            try:
                archive = zipfile.ZipFile(place)
            except zipfile.BadZipFile as error:
                raise ConfigError(f"{place} is no wheel: {error}") from error
            self.names = [name.removeprefix(f"{PACKAGE}/") for name in archive.namelist()]
            self._read = lambda name: archive.read(f"{PACKAGE}/{name}")
        else:
            self.names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
            self._read = lambda name: (place / name).read_bytes()
        if not any(name.startswith("systems/") for name in self.names):
            raise ConfigError(f"{place} has no folder systems; give a wheel of aiconfigurator-core from 0.12 on")

    def system(self, name: str) -> dict[str, Any]:
        """What the package says of a system: a card and how cards are connected."""
        known = sorted(PurePosixPath(one).stem for one in self.names if PurePosixPath(one).parent.name == "systems")
        if f"systems/{name}.yaml" not in self.names:
            raise ConfigError(f"--system {name}: there is no such system; there are {', '.join(known)}")
        content: dict[str, Any] = yaml.safe_load(self._read(f"systems/{name}.yaml"))
        return content

    def table(self, system: str, kind: str, framework: str, file: str) -> tuple[pd.DataFrame, str]:
        """The newest table of a kind, and its version. Raises ConfigError where there is none."""
        start = f"systems/data/{system}/{kind}/{framework}/"
        found = [name for name in self.names if name.startswith(start) and name.endswith(f"/{file}.parquet")]
        if not found:
            raise ConfigError(f"{self.name} has no {start}*/{file}.parquet; try another --framework")
        newest = max(found, key=lambda name: [int(part) for part in re.findall(r"\d+", name.split("/")[5])])
        return pq.read_table(io.BytesIO(self._read(newest))).to_pandas(), newest.split("/")[5]


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Attention over the whole context, with keys and values in bf16."""
    kept = table["kv_cache_dtype"].isin(["bfloat16", "float16"]) & (table["window_size"] == 0)
    return table[kept & table["head_dim"].isin([64, 128])]


def operations(source: Source, system: str, framework: str) -> tuple[pd.DataFrame, list[str]]:
    """The tables by COLUMNS, and the versions that they are of."""
    gemm, of_gemm = source.table(system, "gemm", framework, "gemm_perf")
    context, of_attention = source.table(system, "attention", framework, "context_attention_perf")
    generation, _ = source.table(system, "attention", framework, "generation_attention_perf")
    experts, of_experts = source.table(system, "moe", framework, "moe_perf")
    gemm = gemm[gemm["gemm_dtype"] == "bfloat16"]
    context, generation = _plain(context), _plain(generation)
    context = context[context["step"] == 0]
    balanced = (experts["distribution"] == "balanced") & (experts["moe_ep_size"] == 1)
    experts = experts[(experts["moe_dtype"] == "bfloat16") & balanced]
    # A table without grouped queries calls it as many KV heads as heads.
    parts = [
        gemm.assign(op="gemm"),
        context.assign(op="context", n=context["num_heads"], k=context["num_key_value_heads"], d=context["head_dim"],
                       length=context["isl"], m=context["batch_size"]),
        generation.assign(op="generation", m=generation["batch_size"], n=generation["num_heads"],
                          k=generation["num_key_value_heads"], d=generation["head_dim"], length=generation["step"] + 1),
        experts.assign(op="experts", m=experts["num_tokens"], n=experts["hidden_size"], k=experts["inter_size"],
                       d=experts["num_experts"], length=experts["topk"], ranks=experts["moe_tp_size"]),
    ]  # fmt: skip
    whole = pd.concat([part.assign(seconds=part["latency"] / 1e3) for part in parts], ignore_index=True)
    whole = whole.reindex(columns=COLUMNS).fillna(0)
    keys = [name for name in COLUMNS if name != "seconds"]
    whole = whole.groupby(keys, as_index=False)["seconds"].min()  # of several kernels the one that an engine would take
    versions = [f"products {of_gemm}", f"attention {of_attention}", f"experts {of_experts}"]
    return whole, versions


def all_reduces(source: Source, system: str, framework: str) -> tuple[dict[int, dict[str, list[float]]], str]:
    """Seconds by bytes, for each number of ranks: in a graph or by NCCL, whichever is faster."""
    custom, version = source.table(system, "comm", framework, "custom_allreduce_perf")
    library, of_nccl = source.table(system, "comm", "nccl", "nccl_perf")
    graph = custom[custom["kernel_source"].str.endswith("graph")]
    plain = library[(library["op_name"] == "all_reduce") & (library["nccl_dtype"] == "half")]
    both = pd.concat([graph, plain])
    fastest = both.groupby(["num_gpus", "message_size"])["latency"].min() / 1e3
    tables = {}
    for ranks in sorted(fastest.index.get_level_values(0).unique()):
        one = fastest[ranks].sort_index()
        seconds = [float(f"{value:.3g}") for value in one.values]
        tables[int(ranks)] = {"bytes": [float(size) for size in one.index], "seconds": seconds}
    return tables, f"{framework} {version} in a CUDA graph and NCCL {of_nccl}"


def write_tables(path: Path, tables: pd.DataFrame) -> None:
    """Write the Parquet file of a profile."""
    schema = pa.schema(
        [("op", pa.string()), *((name, pa.int32()) for name in COLUMNS[1:-1]), ("seconds", pa.float32())]
    )
    table = pa.Table.from_pandas(tables, schema, preserve_index=False)
    pq.write_table(table, path, compression="zstd", compression_level=19)


def main(argv: Sequence[str]) -> int:
    """Write the profile."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("tables", nargs="?", type=Path, help="a wheel of aiconfigurator-core, or its folder "
                        "(default: the installed package)")  # fmt: skip
    parser.add_argument("--system", default="h200_sxm", help="the card (default: h200_sxm)")
    parser.add_argument("--framework", default="sglang", choices=("sglang", "trtllm", "vllm"),
                        help="whose kernels (default: sglang)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the profile: FILE.yaml")
    args = parser.parse_args(argv)
    if args.out.suffix != ".yaml":
        raise ConfigError(f"--out {args.out} must end with .yaml")
    source = Source(args.tables)
    system = source.system(args.system)
    whole, versions = operations(source, args.system, args.framework)
    reduces, of_reduces = all_reduces(source, args.system, args.framework)
    card, node = system["gpu"], system["node"]
    write_tables(args.out.with_suffix(".parquet"), whole)
    made_by = f"AIConfigurator's tables ({source.name}, Apache-2.0)"
    content = {
        "kind": "tables",
        "source": f"{made_by}: {args.system}, {args.framework}: {', '.join(versions)}",
        "tables": args.out.with_suffix(".parquet").name,
        "memory_bytes": float(card["mem_capacity"]),
        "bandwidth": float(card["mem_bw"] * card["mem_bw_empirical_scaling_factor"]),
        "fill_queries": float(FILL),
        "copy_bandwidth": float(node["pcie_bw"] * 0.76),
        "copy_gap": 3.2e-6,
        "host": HOST,
        "collectives": {
            "source": f"{made_by}: {of_reduces}; sends at the link's nominal rate",
            "all_reduce": reduces,
            "send_latency": float(node["p2p_latency"]),
            "send_bandwidth": float(node["intra_node_bw"]),
        },
        "error": "",
    }
    head = f"# {args.system}, for models of Llama's or Mixtral's layers: step time = sums of published operations.\n"
    head += "# Made by kvarena make profile (docs/simulator.md); seconds and bytes.\n"
    args.out.write_text(head + yaml.safe_dump(content, sort_keys=False, width=110, default_flow_style=None))
    print(f"{args.out} and {args.out.with_suffix('.parquet')}: {len(whole):,} operations", file=sys.stderr)
    return 0
