"""What images cost an engine: pixels, tower, prompts, and the pauses of those who decode beside them.

    kvarena benchmark images model=internvl2-8b-shape engine.dtype=bfloat16 engine.max_model_len=4096

Prints JSON lines. `start`: seconds to build the engine, to warm it up, and to make the pictures. `pixels`: decoding a
PNG, cutting and digesting it, on one core of the host. `tower`: encoding an image's tiles, then as many as are encoded
at once; these on a GPU by each of PyTorch's attention kernels too, where the tower is fused. `images` and `text`: the
same number of requests at once, each with an image of its own, and with text of equal length; tiles are ready, as a
server's front has them. Their `split`: what a request took of the device for the tower, in steps with prompts beside
it, and in steps that only decode; and what the launches took of the host. `gaps`: requests that decode while others
arrive, p99 of the time between two of their tokens, beside images and beside text.

Engines are built from the main job's config, with the settings that follow the options; unless these say otherwise a
step has up to 8,192 tokens, and the KV pool is what is left of the device.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend

from kvarena.engine.core import StepOutput
from kvarena.engine.errors import ConfigError, EngineError
from kvarena.engine.request import ImageSpan, Request, SamplingParams
from kvarena.engine.server.media.parts import MediaPolicy, check_image, decode_image
from kvarena.engine.vision.encoder import ImageEncoder
from kvarena.engine.vision.internvl_tower import InternVLTower
from kvarena.engine.vision.processing import TILES_AT_ONCE, identity, image_span
from kvarena.experiments.building.build import build_engine
from kvarena.experiments.building.parts import EngineParts
from kvarena.experiments.building.warm_up import SERVED, warm_up
from kvarena.experiments.gpu.engines import check_overrides
from kvarena.experiments.gpu.image_split import Split
from kvarena.experiments.settings.compose import load_run
from kvarena.experiments.tools import tool_parser

Line = dict[str, Any]
TEXT_TOKEN = 11
# A shape's pool is small unless told otherwise: it holds four such prompts, and requests would wait for one another.
DEFAULTS = (
    "allocator=paged_prefix", "scheduler=chunked", "scheduler.max_num_batched_tokens=8192",
    "scheduler.max_num_seqs=128", "engine.overlap=true", "kv_cache.num_slots=null",
)  # fmt: skip
NUM_TIMED = 4  # pictures whose pixels are timed
ATTENTION = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


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

    def picture(self, seed: int) -> Image.Image:
        """Noise in large patches: any two differ in all tiles."""
        rough = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        return Image.fromarray(rough).resize(self._args.size)

    def make_image(self, seed: int) -> ImageSpan:
        """A picture as the engine gets it, at position 0."""
        return image_span(self._processing, self.picture(seed))

    def pixels(self, seed: int) -> Line:
        """Milliseconds that a PNG takes until it is an engine's, and their parts."""
        file = io.BytesIO()
        self.picture(seed).save(file, "PNG", compress_level=1)
        marks = [time.perf_counter()]
        check_image(file.getvalue(), "image/png", "image", MediaPolicy())
        pixels = decode_image(file.getvalue(), "image")
        marks.append(time.perf_counter())
        tiles = self._processing.cut(pixels)
        marks.append(time.perf_counter())
        identity(self._processing, pixels.size, tiles)
        marks.append(time.perf_counter())
        parts = [1e3 * (b - a) for a, b in pairwise(marks)]
        return {"ms": sum(parts)} | dict(zip(("decode_ms", "tiles_ms", "digest_ms"), parts, strict=True))

    def make_images(self, count: int) -> list[ImageSpan]:
        """As many, on all cores: PIL and the digest leave the interpreter to others."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return list(threads.map(self.make_image, range(count)))

    def check_pool(self, image: ImageSpan) -> None:
        """Raise ConfigError where the pool is too small for all to run at once: then waiting would be measured."""
        args, allocator = self._args, self._parts.engine.allocator
        each = image.stop + args.text + args.output
        beside = args.decodes * self._parts.max_model_len + args.gap_requests * each
        wanted, there = max(args.requests * each, beside), allocator.num_blocks * allocator.block_size
        if there < wanted:
            raise ConfigError(
                f"the KV pool has {there} slots, and the requests that run at once take {wanted}: they would wait for "
                f"one another; set kv_cache.num_slots={wanted} or more, or lower --requests, --gap-requests, --decodes"
            )

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
        while any(not req.output_token_ids for req in background):
            self._step()
        start = engine.clock.now()
        for req in requests:
            engine.add(req)
        while engine.has_work:
            output = self._step()
            if output is None:
                continue
            for (req, _, _), token in zip(output.plan.scheduled, output.result.token_ids, strict=True):
                if token is not None:
                    times[req.request_id].tokens.append(output.end_time - start)
            if all(req.is_finished for req in requests):
                for req in background:
                    engine.abort(req.request_id)
            elif any(req.is_finished for req in background):
                raise EngineError("a request that was to decode beside the others ended first; raise max_model_len")
        return times

    def _step(self) -> StepOutput | None:
        engine = self._parts.engine
        output = engine.step()
        if output is None and engine.has_work and not engine.in_flight:
            raise EngineError("the scheduler has requests and plans nothing: no progress is possible")
        return output

    def throughput(self, requests: Sequence[Request]) -> Line:
        """All at once: rates, and times to first tokens."""
        before = self.images.counts
        with Split(self._parts.engine.runner, self.images) as split:
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
            "split": split.per_request(len(requests)),
        }  # fmt: skip

    def gaps(self, requests: Sequence[Request]) -> float:
        """p99 of the seconds between two tokens of requests that decode while `requests` are taken in."""
        background = self.decoding(self._parts.max_model_len - self._args.text - 1)
        times = self.run(requests, background)
        gaps = [b - a for req in background for a, b in pairwise(times[req.request_id].tokens)]
        return float(np.percentile(gaps, 99))

    def tower(self, image: ImageSpan) -> Line:
        """Milliseconds to encode an image's tiles and the tower's largest batch, from the host's memory."""
        num_largest = max(1, TILES_AT_ONCE // image.tile_weight)
        largest = [image.pixels[i % image.num_tiles] for i in range(num_largest)]
        took, most = self._encode(list(image.pixels)), self._encode(largest)
        line = {"tiles": image.num_tiles, "ms": took, "ms_a_tile": round(took / image.num_tiles, 3)}
        line |= {f"ms_a_tile_of_{num_largest}": round(most / num_largest, 3)}
        tower = self.images.tower
        fused = tower.fused if isinstance(tower, InternVLTower) else None
        line["fused"] = fused is not None
        if fused is not None and torch.cuda.is_available():
            order = fused.attention
            for kernel in ATTENTION:
                fused.attention = (kernel, *(other for other in order if other is not kernel))
                line[f"ms_{kernel.name.lower()}"] = self._encode(largest)
            fused.attention = order
        return line

    def _encode(self, tiles: list[np.ndarray]) -> float:
        """The best of some runs, behind one that plans its attention."""
        best = float("inf")
        for _ in range(6):
            _wait()
            start = time.perf_counter()
            self.images.encode(tiles)
            _wait()
            best = min(best, time.perf_counter() - start)
        return round(best * 1e3, 3)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def lines(bench: Bench, images: Sequence[ImageSpan], num_requests: int) -> Iterator[Line]:
    """All sections, each as soon as it is known; the images behind the first `num_requests` are of `gaps`."""
    timed = [bench.pixels(2**31 + seed) for seed in range(NUM_TIMED)]
    best = {key: round(min(one[key] for one in timed), 2) for key in timed[0]}
    yield {"section": "pixels", "tiles": images[0].num_tiles} | best
    yield {"section": "tower"} | bench.tower(images[0])
    for name, as_text in (("images", False), ("text", True)):
        yield {"section": name} | bench.throughput(bench.requests(images[:num_requests], as_text=as_text))
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
    parser.add_argument("--gap-requests", type=int, default=24, help="that arrive beside those that decode")
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
    bench.run(bench.requests([bench.make_image(2**31)], as_text=False))  # compiles what images need
    ready = time.perf_counter()
    images = bench.make_images(args.requests + args.gap_requests)
    bench.check_pool(images[0])
    marks = {"build_s": built - began, "warm_s": ready - built, "pictures_s": time.perf_counter() - ready}
    print(json.dumps({"section": "start"} | {key: round(took, 1) for key, took in marks.items()}), flush=True)
    for line in lines(bench, images, args.requests):
        print(json.dumps(line), flush=True)
    return 0
