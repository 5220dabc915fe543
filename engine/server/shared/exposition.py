"""The metrics page in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from kvarena.engine.server.shared.metrics import METRICS, Metric, Rows, offset_of


class _PageCollector(Collector):
    """Adds the rows of each engine up; of HTTP, which belongs to no engine, all rows."""

    def __init__(self, rows: Rows, model_name: str, cache_configs: Sequence[Mapping[str, str]]) -> None:
        self._model_name, self._cache_configs = model_name, cache_configs
        self._engines = [rows.of_engine(engine) for engine in range(len(rows.engines))]

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily | InfoMetricFamily]:
        engines = [[row.copied() for row in rows] for rows in self._engines]  # each row as it is at one moment
        everyone = [values for rows in engines for values in rows]
        for metric in METRICS:
            if metric.kind == "internal":
                continue
            is_http = metric.name.startswith("http_")
            names = [*([] if is_http else ["model_name", "engine"]), *metric.labels]
            family: GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily
            if metric.kind == "histogram":
                family = HistogramMetricFamily(metric.name, metric.help, labels=names)
            elif metric.kind == "counter":
                family = CounterMetricFamily(metric.name, metric.help, labels=names)
            else:
                family = GaugeMetricFamily(metric.name, metric.help, labels=names)
            for engine, rows in enumerate([everyone] if is_http else engines):
                base = [] if is_http else [self._model_name, str(engine)]
                for values in product(*metric.labels.values()):
                    at = offset_of(metric.name, *values)
                    if isinstance(family, HistogramMetricFamily):
                        _add_histogram(family, metric, [*base, *values], rows, at)
                    else:
                        family.add_metric([*base, *values], _sum(rows, at))
            yield family
        names = list(dict.fromkeys(name for config in self._cache_configs for name in config))
        info = GaugeMetricFamily("vllm:cache_config_info", "The cache's configuration.", labels=["engine", *names])
        for engine, config in enumerate(self._cache_configs):
            info.add_metric([str(engine), *(config.get(name, "") for name in names)], 1.0)
        yield info


def _sum(rows: Sequence[Sequence[float]], offset: int) -> float:
    return sum(values[offset] for values in rows)


def _add_histogram(
    family: HistogramMetricFamily, metric: Metric, labels: list[str], rows: Sequence[Sequence[float]], at: int
) -> None:
    total = 0.0
    buckets: list[tuple[str, float]] = []
    for i, bound in enumerate((*metric.buckets, float("inf"))):
        total += _sum(rows, at + i)
        buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
    if total == 0 and metric.labels:
        return
    family.add_metric(labels, buckets=buckets, sum_value=_sum(rows, at + len(metric.buckets) + 1))


def render(rows: Rows, model_name: str, cache_configs: Sequence[Mapping[str, str]]) -> bytes:
    """The page in Prometheus' text format; `cache_configs` are of each engine."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_PageCollector(rows, model_name, cache_configs))
    return generate_latest(registry)
