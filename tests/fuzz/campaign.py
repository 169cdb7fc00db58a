"""Many mutations of every kind of file, each read in a fork, and what became of it.

    clean                    refused in one line
    accepted, same           the result is that of the whole file
    accepted, differs        it is another one, and a class of `classes.py` says why that is right
    accepted, not finite     likewise, and it holds NaN or infinity

All else is a failure: those of `outcomes.py`, and `unexplained`, an acceptance that no class explains.
"""

import gc
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from classes import explained
from differences import Difference, with_difference
from mutations import Mutation, of_special, put
from outcomes import Limits, Outcome, outcome_of
from readers import MUTATIONS, Reader

FINE = ("clean", "accepted, same", "accepted, differs", "accepted, not finite")
SPECIAL_SHARE = 0.03  # of all mutations: no regular file stands in the file's place


@dataclass
class Result:
    """kind: one of FINE, or a failure. why: the classes of the differences, or the first that has none."""

    reader: str
    file: str
    seed: int
    number: int
    what: str
    kind: str
    why: str
    message: str
    where: str

    @property
    def fine(self) -> bool:
        return self.kind in FINE


class Bench:
    """A reader, and a copy of its folder that mutations are put into. The whole files have to be read."""

    def __init__(self, reader: Reader, inputs: Path, work: Path, limits: Limits = Limits()):  # noqa: B008
        self.reader, self.limits = reader, limits
        self.source, self.folder = inputs / reader.folder, work / reader.name.replace("/", "-")
        self.whole = {name: (self.source / name).read_bytes() for name in reader.files}
        self._renew()
        usual = outcome_of(reader.read, self.folder, limits)
        assert usual.kind == "accepted", f"{reader.name}: the whole files are not read: {usual}"
        self.digest = usual.digest
        self._restore(next(iter(reader.files)))

    def mutation(self, seed: int, number: int) -> tuple[str, Mutation]:
        """The file that is changed, and how: functions of the reader, the seed and the number alone."""
        draw = Random(f"{self.reader.name} {seed} {number}")
        file = draw.choice([*self.reader.files])
        if draw.random() < SPECIAL_SHARE and not self.reader.is_flag:
            return file, of_special(draw)
        return file, MUTATIONS[self.reader.files[file]](self.whole[file], draw)

    def run(self, seed: int, number: int) -> Result:
        file, mutation = self.mutation(seed, number)
        outcome = self._outcome(file, mutation)
        if outcome.kind == "hang":  # a fault hangs again; a machine that stood still meanwhile does not
            outcome = self._outcome(file, mutation)
        kind, why = self.judged(file, mutation, outcome)
        what = mutation.what.encode("ascii", "backslashreplace").decode()
        return Result(self.reader.name, file, seed, number, what, kind, why, outcome.message, outcome.where)

    def _outcome(self, file: str, mutation: Mutation) -> Outcome:
        put(mutation, self.folder / file)
        outcome = outcome_of(self.reader.read, self.folder, self.limits)
        self._restore(file)
        return outcome

    def judged(self, file: str, mutation: Mutation, outcome: Outcome) -> tuple[str, str]:
        if outcome.kind != "accepted":
            return outcome.kind, ""
        if outcome.digest == self.digest:
            return "accepted, same", ""
        found = self._explained(file, mutation)
        if not found or mutation.special not in ("", "empty"):
            return "unexplained", "it is not known what the file says"
        left = [difference for difference, name in found if name is None]
        if left:
            return "unexplained", str(left[0])
        names = ", ".join(sorted({name for _, name in found if name}))
        return "accepted, differs" if outcome.finite else "accepted, not finite", names

    def _explained(self, file: str, mutation: Mutation) -> list[tuple[Difference, str | None]]:
        """Several differences in JSON without those that alone change nothing: the others have been explained."""
        holds = self.reader.files[file]
        found = explained(self.reader.name, holds, self.whole[file], mutation.data)
        if holds not in ("json", "adapter config") or len(found) == 1:
            return found
        return [(d, name) for d, name in found if name or self._alone(file, d) != self.digest]

    def _alone(self, file: str, difference: Difference) -> str:
        (self.folder / file).write_bytes(with_difference(self.whole[file], difference))
        outcome = outcome_of(self.reader.read, self.folder, self.limits)
        self._restore(file)
        return outcome.digest

    def _restore(self, file: str) -> None:
        if self.reader.writes:
            self._renew()
            return
        place = self.folder / file
        if place.is_dir() and not place.is_symlink():
            place.rmdir()
        else:
            place.unlink(missing_ok=True)
        place.write_bytes(self.whole[file])

    def _renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.source, self.folder)


def chosen(readers: Sequence[Reader], names: Sequence[str]) -> list[Reader]:
    """Those that a name is, or is the beginning of: `rows`, `rows/text`. All without names."""
    return [r for r in readers if not names or any(f"{r.name}/".startswith(f"{name}/") for name in names)]


def warm_up(readers: Sequence[Reader], inputs: Path, work: Path) -> None:
    """Read every input once in this process, so that forks find everything imported and built."""
    null, streams = os.open(os.devnull, os.O_RDWR), [os.dup(1), os.dup(2)]
    try:
        for stream in (1, 2):
            os.dup2(null, stream)
        for reader in {(r.folder, r.read): r for r in readers}.values():
            folder = work / "warm"
            shutil.copytree(inputs / reader.folder, folder)
            reader.read(folder)
            shutil.rmtree(folder)
    finally:
        for stream, saved in zip((1, 2), streams, strict=True):
            os.dup2(saved, stream)
            os.close(saved)
        os.close(null)
    gc.freeze()  # or a collection in a fork copies every page


def results_of(
    reader: Reader,
    inputs: Path,
    work: Path,
    seed: int,
    count: int,
    limits: Limits = Limits(),  # noqa: B008
) -> Iterator[Result]:
    """Cases 0 to count - 1 of a reader."""
    bench = Bench(reader, inputs, work, limits)
    for number in range(count):
        yield bench.run(seed, number)
    shutil.rmtree(bench.folder)
