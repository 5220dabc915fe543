"""What images cost an engine: pixels, tower, prompts, and the pauses of those who decode beside them.

    kvarena benchmark images model=internvl2-8b-shape engine.dtype=bfloat16 engine.max_model_len=4096

Prints JSON lines. `start`: seconds to build the engine and to warm it up. `pixels`: decoding a PNG, cutting and
digesting it, on one core of the host. `tower`: encoding an image's tiles. `images` and `text`: the same number of
requests at once, each with an image of its own, and with text of equal length; tiles are ready, as a server's front has
them. `gaps`: requests that decode while the others arrive, p99 of the time between two of their tokens, beside images
and beside text. Engines are built from the main job's config, with the settings that follow the options.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from kvarena.engine.errors import ConfigError
from kvarena.engine.request import ImageSpan, Request, SamplingParams
from kvarena.engine.server.media.parts import MediaPolicy, check_image, decode_image
from kvarena.engine.vision.encoder import ImageEncoder
from kvarena.engine.vision.processing import image_span
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.building.warm_up import SERVED, warm_up
from kvarena.experiments.gpu.engines import check_overrides
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.tools import tool_parser

Line = dict[str, Any]
TEXT_TOKEN = 11
DEFAULTS = ("allocator=paged_prefix", "scheduler=chunked", "engine.overlap=true")


@dataclass
class Times:
    """When a request's tokens were there, in seconds after the first request came."""

    tokens: list[float] = field(default_factory=list)


class Bench:
    """An engine and the requests that it is asked.

    Args:
        parts: of a model that reads images.
        args: the command line.

    Raises:
        ConfigError: the model reads text only.
    """

    def __init__(self, parts: EngineParts, args: argparse.Namespace) -> None:
        if parts.model is None or parts.model.images is None:
            raise ConfigError(
                "kvarena benchmark images needs a model that reads images, such as model=internvl2-8b-shape"
            )
        self.images: ImageEncoder = parts.model.images
        self._parts, self._args = parts, args
        self._processing = self.images.tower.processing
        self._num_made = 0

    def make_image(self, seed: int) -> tuple[ImageSpan, float]:
        """A picture as the engine gets it, at position 0, and the seconds that its pixels took."""
        rough = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(rough).resize(self._args.size).save(file, "PNG", compress_level=1)
        start = time.perf_counter()
        check_image(file.getvalue(), "image/png", "image", MediaPolicy())
        made = image_span(self._processing, decode_image(file.getvalue(), "image"))
        return made, time.perf_counter() - start

    def requests(self, images: Sequence[ImageSpan], *, as_text: bool) -> list[Request]:
        """A request an image: it, and so many tokens of text; `as_text`: text of the same length in its place."""
        made = []
        for image in images:
            self._num_made += 1
            # Each begins with a token of its own: no prefix is anybody else's.
            ids = [TEXT_TOKEN + 1 + self._num_made] * image.stop if as_text else [TEXT_TOKEN] * image.stop
            spans = () if as_text else (image,)
            params = SamplingParams(max_tokens=self._args.output, ignore_eos=True)
            prompt = ids + [TEXT_TOKEN] * self._args.text
            made.append(Request(f"i{self._num_made}", prompt, params, images=spans))
        return made

    def decoding(self, max_tokens: int) -> list[Request]:
        """Requests of short prompts and long answers."""
        made = []
        for _ in range(self._args.decodes):
            self._num_made += 1
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
            made.append(Request(f"d{self._num_made}", [TEXT_TOKEN + 1 + self._num_made] * self._args.text, params))
        return made

    def run(self, requests: Sequence[Request], background: Sequence[Request] = ()) -> dict[str, Times]:
        """Run `requests`, all at once; `background` has begun to decode before. Returns the times of both."""
        engine = self._parts.engine
        times = {req.request_id: Times() for req in (*requests, *background)}
        for req in background:
            engine.add(req)
        waiting = list(requests)
        while background and any(not req.output_token_ids for req in background):
            engine.step()
        start = engine.clock.now()
        for req in waiting:
            engine.add(req)
        while engine.has_work:
            output = engine.step()
            if output is None:
                continue
            for (req, _, _), token in zip(output.plan.scheduled, output.result.token_ids, strict=True):
                if token is not None:
                    times[req.request_id].tokens.append(output.end_time - start)
            if all(req.is_finished for req in requests):
                for req in background:
                    engine.abort(req.request_id)
        return times

    def throughput(self, requests: Sequence[Request]) -> Line:
        """All at once: rates, and times to first tokens."""
        before = self.images.counts
        times = self.run(requests)
        firsts = [times[req.request_id].tokens[0] for req in requests]
        wall = max(times[req.request_id].tokens[-1] for req in requests)
        return {
            "requests": len(requests), "prompt_tokens": sum(req.num_prompt_tokens for req in requests),
            "seconds": round(wall, 3), "requests_per_s": round(len(requests) / wall, 2),
            "ttft_p50_s": round(float(np.percentile(firsts, 50)), 4),
            "ttft_p99_s": round(float(np.percentile(firsts, 99)), 4),
            "tiles_encoded": self.images.counts.misses - before.misses,
            "tiles_found": self.images.counts.hits - before.hits,
        }  # fmt: skip

    def gaps(self, requests: Sequence[Request]) -> float:
        """p99 of the seconds between two tokens of requests that decode while `requests` are taken in."""
        background = self.decoding(self._parts.max_model_len - self._args.text - 1)
        times = self.run(requests, background)
        gaps = [b - a for req in background for a, b in pairwise(times[req.request_id].tokens)]
        return float(np.percentile(gaps, 99))

    def tower(self, image: ImageSpan) -> Line:
        """Seconds to encode an image's tiles."""
        best = float("inf")
        for _ in range(3):
            _wait()
            start = time.perf_counter()
            self.images.encode(list(image.pixels))
            _wait()
            best = min(best, time.perf_counter() - start)
        return {
            "tiles": image.num_tiles,
            "ms": round(best * 1e3, 3),
            "ms_a_tile": round(best * 1e3 / image.num_tiles, 3),
        }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def lines(bench: Bench, num_requests: int) -> Iterator[Line]:
    """All sections, each as soon as it is known."""
    made = [bench.make_image(seed) for seed in range(2 * num_requests)]
    images, seconds = [image for image, _ in made], [took for _, took in made]
    yield {"section": "pixels", "ms": round(float(np.median(seconds)) * 1e3, 2), "tiles": images[0].num_tiles}
    yield {"section": "tower"} | bench.tower(images[0])
    half = images[:num_requests]
    for name, as_text in (("images", False), ("text", True)):
        yield {"section": name} | bench.throughput(bench.requests(half, as_text=as_text))
    beside = {
        name: bench.gaps(bench.requests(images[num_requests:], as_text=as_text))
        for name, as_text in (("images", False), ("text", True))
    }
    line = {f"p99_ms_beside_{name}": round(gap * 1e3, 3) for name, gap in beside.items()}
    yield {"section": "gaps"} | line | {"ratio": round(beside["images"] / beside["text"], 3)}


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = tool_parser(__name__, __doc__)
    parser.add_argument("--requests", type=int, default=64, help="with an image each, all at once")
    parser.add_argument("--size", type=_size, default=(1024, 768), metavar="WxH", help="of an image, in pixels")
    parser.add_argument("--text", type=int, default=64, help="tokens of text behind an image")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--decodes", type=int, default=16, help="requests that decode beside the others")
    parser.add_argument("overrides", nargs="*", help="settings of the engine, as of run.py")
    args = parser.parse_args(argv)
    check_overrides(args.overrides)
    given = {one.partition("=")[0] for one in args.overrides}
    config = load_run([*(one for one in DEFAULTS if one.partition("=")[0] not in given), *args.overrides])
    began = time.perf_counter()
    parts = build_engine(config)
    bench = Bench(parts, args)
    built = time.perf_counter()
    warm_up(config, parts, SERVED)
    bench.run(bench.requests([bench.make_image(2**31)[0]], as_text=False))  # compiles what images need
    ready = time.perf_counter()
    print(
        json.dumps({"section": "start", "build_s": round(built - began, 1), "warm_s": round(ready - built, 1)}),
        flush=True,
    )
    for line in lines(bench, args.requests):
        print(json.dumps(line), flush=True)
    return 0
