"""`./dev bench gpu [--model FOLDER] [--size N] ...`: pictures a second, for three ways of drawing the same jobs.

- one at a time: the plain pipeline, job after job;
- equal settings: the plain pipeline, with jobs of equal steps and guidance in one call, as a batching server does;
- shared steps: Darkroom's backend, jobs of one size sharing each call of the UNet whatever their settings.

The jobs are mixed (8 to 20 steps, two strengths of guidance) and the same for all three, and the ways take turns. The
model is a tiny one of random weights, unless a folder is given: its figures say what the loop around the model costs,
and nothing about pictures.
"""

import argparse
import gc
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

from bench.machine import hardware
from worker.backends.base import Picture, Request
from worker.backends.batch_room import MOST_AT_ONCE, BatchRoom
from worker.backends.diffusers import Diffusers
from worker.backends.provenance import COMPRESSION

WORDS = ("a lighthouse at night", "a fox in the snow", "mountains", "a city from above", "the sea", "an old door")
STEPS = (8, 12, 16, 20)
GUIDANCE = (5.0, 7.5)


@dataclass
class Calls:
    """What the UNet was asked, and how long it took. Rows are jobs, not the two passes of guidance."""

    rows: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    pictures: int
    seconds: float
    calls: Calls
    peak_bytes: int | None


Way = Callable[[Sequence[Request]], int]


class Ways:
    """The three ways of drawing, on one copy of the weights."""

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self.backend = Diffusers(model, device=device, dtype=dtype)
        self.backend.load()
        self._sdxl = self.backend._sdxl
        self._pipeline = self._sdxl._pipeline
        self._room = BatchRoom(MOST_AT_ONCE)
        self.all: dict[str, Way] = {
            "one at a time": lambda jobs: sum(self._together([job]) for job in jobs),
            "equal settings": self._equal_settings,
            "shared steps": self._shared_steps,
        }

    def _equal_settings(self, jobs: Sequence[Request]) -> int:
        groups: defaultdict[tuple[Any, ...], list[Request]] = defaultdict(list)
        for job in jobs:
            groups[tuple(job.input[name] for name in ("width", "height", "num_steps", "guidance"))].append(job)
        return sum(
            self._together(group[first : first + cap])
            for key, group in groups.items()
            for cap in [self._room.cap((key[0], key[1]))]
            for first in range(0, len(group), cap)
        )

    def _together(self, jobs: Sequence[Request]) -> int:
        import torch

        images = self._pipeline(
            [job.input["prompt"] for job in jobs],
            width=jobs[0].input["width"],
            height=jobs[0].input["height"],
            num_inference_steps=jobs[0].input["num_steps"],
            guidance_scale=jobs[0].input["guidance"],
            generator=[torch.Generator("cpu").manual_seed(job.input["seed"]) for job in jobs],
        ).images
        for image in images:
            image.save(BytesIO(), "PNG", compress_level=COMPRESSION)
        return len(images)

    def _shared_steps(self, jobs: Sequence[Request]) -> int:
        """Each job from a thread of its own, all at once: as a worker whose queue is full."""
        outcomes: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda job=job: outcomes.extend(self.backend.generate([job], lambda *_: None, lambda _: False))
            )
            for job in jobs
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(isinstance(outcome, Picture) for outcome in outcomes)

    def run(self, way: Way, jobs: Sequence[Request]) -> Run:
        import torch

        gc.collect()
        cuda = self._sdxl.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with self._counted() as calls:
            began = time.perf_counter()
            pictures = way(jobs)
            seconds = time.perf_counter() - began
        return Run(pictures, seconds, calls, torch.cuda.max_memory_allocated() if cuda else None)

    @contextmanager
    def _counted(self) -> Iterator[Calls]:
        calls, unet = Calls(), self._pipeline.unet
        real = unet.forward

        def forward(latents: Any, *arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            answer = real(latents, *arguments, **named)
            self._sdxl._wait_for_the_card()
            calls.seconds.append(time.perf_counter() - began)
            calls.rows.append(len(latents) / 2)  # all jobs have guidance
            return answer

        unet.forward = forward
        try:
            yield calls
        finally:
            unet.forward = real


def mixed_jobs(sizes: Sequence[int], count: int) -> list[Request]:
    """The same ones at every run; the sizes alternate."""
    chance = random.Random(1)
    return [
        Request(
            f"job_{seed}",
            "sdxl",
            {
                "prompt": chance.choice(WORDS),
                "width": size,
                "height": size,
                "num_steps": chance.choice(STEPS),
                "guidance": chance.choice(GUIDANCE),
                "seed": seed,
            },
        )
        for seed, size in zip(range(count), itertools.cycle(sizes))
    ]


def table(runs: dict[str, list[Run]]) -> str:
    lines = [
        "| way | pictures/s (range) | calls | jobs a call | ms a call | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, several in runs.items():
        rates = sorted(run.pictures / run.seconds for run in several)
        last = several[-1]
        peak = "-" if last.peak_bytes is None else f"{last.peak_bytes / 2**30:.1f} GiB"
        lines.append(
            f"| {name} | {statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f}) | {len(last.calls.rows)} "
            f"| {statistics.mean(last.calls.rows):.2f} | {1000 * statistics.mean(last.calls.seconds):.1f} | {peak} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./dev bench gpu", description="Three ways of drawing the same jobs.")
    parser.add_argument("--model", help="folder or hub id of an SDXL pipeline (a tiny one of random weights)")
    parser.add_argument("--size", type=int, action="append", help="width and height, pixels; may be repeated (256)")
    parser.add_argument("--jobs", type=int, default=16, help="how many (16)")
    parser.add_argument("--runs", type=int, default=3, help="of each way, in turns (3)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    wanted = parser.parse_args(arguments)
    sizes = wanted.size or [256]
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        model = wanted.model
        if model is None:
            from tests.gpu.tiny_sdxl import save_tiny_sdxl

            model = str(save_tiny_sdxl(Path(folder) / "tiny-sdxl"))
        ways = Ways(model, wanted.device, wanted.dtype)
    facts = ways.backend.describe()
    jobs = mixed_jobs(sizes, wanted.jobs)
    _print(hardware())
    _print(f"{facts['name']}, {facts['dtype']}, torch {facts['torch']}, diffusers {version('diffusers')}")
    _print(f"{wanted.model or 'a tiny model of random weights'}, revision {facts['revision']}")
    of_size = " and ".join(f"{size}x{size}" for size in sizes)
    _print(f"{len(jobs)} jobs of {of_size}, 8 to 20 steps; median of {wanted.runs} runs of each, in turns\n")
    for way in ways.all.values():
        ways.run(way, jobs[: 2 * len(sizes)])  # what is slow only once
    runs: dict[str, list[Run]] = {name: [] for name in ways.all}
    for _ in range(wanted.runs):
        for name, way in ways.all.items():
            runs[name].append(ways.run(way, jobs))
    ways.backend.close()
    _print(table(runs))
    lost = sum(len(jobs) - run.pictures for several in runs.values() for run in several)
    if lost:
        sys.stderr.write(f"{lost} jobs got no picture\n")
    return 1 if lost else 0


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
