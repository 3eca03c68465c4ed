"""What bounds `patchlife predict|embed --ray` on 10, 100 and 1000 machines, from stated assumptions; not measured.

    python bench/ray_archive_scale.py      prints the tables of docs/how_to/archive.md

Each bound is a rate in photos per second that one resource allows; the smallest is the rate of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

MACHINES = (10, 100, 1000)


@dataclass(frozen=True)
class Assumptions:
    """Of one kind of machine, the store and the command.

    Attributes:
        name: of the kind of machine.
        cores: that work on photos.
        core: seconds of a core for a photo: to read, decode and resize it, and without a GPU for the model too.
        gpu: photos per second of the model on the machine's GPU; None without one.
        photo: bytes of a photo.
        network: bytes per second into or out of a machine.
        store: bytes per second that the object store gives in total.
        requests: requests per second that it gives for each prefix; a photo is one request, in a shard too.
        record: bytes of a result.
        parts: parts per second that the command hands out and takes back.
    """

    name: str
    cores: int
    core: float
    gpu: float | None = None
    photo: float = 110e3
    network: float = 1.25e9
    store: float = 25e9
    requests: float = 5.5e3
    record: float = 700
    parts: float = 50

    def bounds(self, machines: int, prefixes: int, part_size: int, by_workers: bool) -> dict[str, float]:
        """Photos per second that each resource allows.

        Args:
            machines: number of machines.
            prefixes: of the object store, over which the photos are spread.
            part_size: photos in a part.
            by_workers: whether the workers write the parts (--out is an address), not the command.
        """
        found = {
            "cores": machines * self.cores / self.core,
            "network of the machines": machines * self.network / self.photo,
            "object store, bytes": self.store / self.photo,
            "object store, requests": prefixes * self.requests,
            "command, parts": self.parts * part_size,
        }
        if self.gpu is not None:
            found["GPUs"] = machines * self.gpu
        if not by_workers:
            found["command, network"] = self.network / self.record
        return found


# A core: 58 photos/s on two slow ones, all in all (ViT-Tiny at budget 0.6, results/ray_archive_cpu_2026-11-27.json),
# rounded; 7 ms of it to read and decode. Beside a GPU the cores decode while it computes; its rate is assumed.
KINDS = (
    Assumptions("32 CPU cores", cores=32, core=0.034),
    Assumptions("16 CPU cores, one GPU", cores=16, core=0.007, gpu=4000),
)


def table(kind: Assumptions, prefixes: int, part_size: int, by_workers: bool) -> str:
    """A Markdown table: machines, rate, what bounds it, what would be next, hours for 10^9 photos."""
    lines = [
        "| machines | photos per second | bound by | next bound | hours for 1,000,000,000 photos |",
        "| ---: | ---: | --- | --- | ---: |",
    ]
    for machines in MACHINES:
        bounds = kind.bounds(machines, prefixes, part_size, by_workers)
        (first, rate), (second, then) = sorted(bounds.items(), key=lambda item: item[1])[:2]
        lines.append(f"| {machines:,} | {rate:,.0f} | {first} | {second} ({then:,.0f}) | {1e9 / rate / 3600:,.1f} |")
    return "\n".join(lines)


def page() -> str:
    """The tables of the documentation."""
    parts = []
    for kind in KINDS:
        plain, wide = table(kind, 10, 1024, False), table(kind, 100, 8192, True)
        parts.append(f"{kind.name}; photos under 10 prefixes, parts of 1,024, `--out` a folder:\n\n{plain}")
        parts.append(f"{kind.name}; photos under 100 prefixes, parts of 8,192, `--out` an address:\n\n{wide}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
