"""Several ranks: sums by MLX's collectives, everything else over the line between them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, groupby
from pathlib import Path
from typing import NoReturn

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..base.errors import RunError, Signalled, UserError
from ..base.say import as_one_of_many, say
from ..base.text import Json
from . import ranks
from .link import Link, Stop
from .ranks import Alone, Costs
from .typed import Tree

STARTED = "MLX_RANK"  # mlx.launch sets it
BACKENDS = ("ring", "jaccl", "nccl")
PIECE = 2**24  # numbers that are summed at once
Arrays = dict[str, mx.array]


class Place:
    """What `mlx.launch` says of where this rank is: backend, how many there are, and where they
    meet, at the port below rank 0's."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.rank = int(env["MLX_RANK"])
        if "NCCL_HOST_IP" in env:
            self.backend, self.size = "nccl", int(env["MLX_WORLD_SIZE"])
            at = f"{env['NCCL_HOST_IP']}:{env['NCCL_PORT']}"
        elif "MLX_IBV_DEVICES" in env:
            self.backend = "jaccl"
            self.size = len(json.loads(Path(env["MLX_IBV_DEVICES"]).read_text(encoding="utf-8")))
            at = env["MLX_JACCL_COORDINATOR"]
        elif "MLX_HOSTFILE" in env:
            self.backend = "ring"
            text = Path(env["MLX_HOSTFILE"]).read_text(encoding="utf-8").strip()
            hosts = json.loads(text or '[["127.0.0.1:32323"]]')  # empty: there is one rank
            self.size, at = len(hosts), hosts[0][0]
        else:
            raise UserError(
                "MLX_RANK is set, but not how ranks reach each other: start them with --ranks or "
                "--hostfile, or by mlx.launch with --backend ring, jaccl or nccl"
            )
        host, _, port = at.rpartition(":")
        self.address = host, int(port) - 1


class Team(Alone):
    """This rank among several."""

    def __init__(self, timeout: float) -> None:
        place = Place(os.environ)
        self.rank, self.size, self.backend = place.rank, place.size, place.backend
        if self.rank:
            as_one_of_many(f"rank {self.rank}")
        if not mx.distributed.is_available(place.backend):
            there = [name for name in BACKENDS if mx.distributed.is_available(name)]
            raise UserError(
                f"this MLX has no {place.backend} backend (it has: {', '.join(there) or 'none'}): "
                "choose another --backend of mlx.launch, or install an MLX that has it"
            )
        self.link = Link(self.rank, self.size, place.address, timeout, say)
        self.link.exchange(None)  # all are there: MLX's own meeting has no time limit
        self.group = mx.distributed.init(strict=True, backend=place.backend)
        self.alone = False
        self.said: dict[str, list[Json]] = {}  # by key

    def places(self, costs: Costs) -> list[int]:
        """The dearest first, each to whom has the least so far; in order again."""
        if self.alone:
            return super().places(costs)
        loads, own = [0.0] * self.size, []
        for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
            least = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[least] += costs[place]
            if least == self.rank:
                own.append(place)
        return sorted(own)

    def all_say(self, value: Json, key: str = "") -> list[Json]:
        if self.alone:
            return [value]
        if key and key in self.said:
            return self.said[key]
        said = self.link.exchange(value)
        if key:
            self.said[key] = said
        return said

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Ranks meet before: on Metal, MLX's collectives fail when they wait for long.

        Raises:
            RunError: a rank was lost meanwhile.
        """
        self.link.exchange(None)
        self.link.in_collective = True
        try:
            with mx.stream(mx.gpu if self.backend == "nccl" else mx.cpu):
                yield
        except RuntimeError as error:
            self.link.check_soon()
            raise RunError(f"the ranks lost each other in a sum: {error}") from error
        finally:
            self.link.in_collective = False

    def added(self, tree: Tree) -> Tree:
        leaves: Arrays = dict(tree_flatten(tree))
        mx.eval(tree)
        flat = {name: leaf.astype(mx.float32).reshape(-1) for name, leaf in leaves.items()}
        shapes = {name: leaf.shape for name, leaf in leaves.items()}
        with self.collective():
            sums = self.summed(flat)
        return tree_unflatten([(name, sums[name].reshape(shapes[name])) for name in shapes])

    def summed(self, flat: Arrays) -> Arrays:
        """(N,) arrays of one type, many of them in one message."""
        found: Arrays = {}
        for names in pieces(flat):
            parts = [flat[name] for name in names]
            ends = np.cumsum([part.size for part in parts]).tolist()
            total = mx.distributed.all_sum(mx.concatenate(parts), group=self.group)
            mx.eval(total)
            found |= dict(zip(names, mx.split(total, ends[:-1]), strict=True))
        return found

    def of_first(self, arrays: dict) -> dict:
        spec = {n: [list(x.shape), str(x.dtype).rpartition(".")[2]] for n, x in arrays.items()}
        (first, *_) = self.all_say(spec)
        found: Arrays = {}
        with self.collective():
            for name, (shape, dtype) in first.items():
                mine = arrays[name] if self.rank == 0 else mx.zeros(shape, getattr(mx, dtype))
                found[name] = mx.distributed.all_sum(mine, group=self.group)
                mx.eval(found[name])
        return found

    def check(self) -> None:
        self.link.check()

    def listen(self, asked: Callable[[], int], obey: Callable[[int], NoReturn]) -> None:
        self.link.asked, self.link.obey = asked, obey

    def tell(self, error: BaseException | int) -> None:
        if isinstance(error, int):
            self.link.ask(Stop(self.rank, "", error))
        else:
            code = getattr(error, "exit_code", 1)
            text = f"rank {self.rank}: {error or type(error).__name__}"
            self.link.ask(Stop(self.rank, text, code=code))

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        before, self.alone = self.alone, True
        try:
            yield
        finally:
            self.alone = before

    def close(self) -> None:
        self.link.close()


@contextmanager
def together(timeout: float) -> Iterator[None]:
    """The ranks that `mlx.launch` started meet, and stay in touch as long as the block lasts.

    Raises:
        UserError: one did not come within `timeout` seconds, or MLX lacks what connects them.
    """
    if STARTED not in os.environ or ranks.here() is not ranks.ALONE:
        yield
        return
    us = Team(timeout)
    ranks.team.append(us)
    try:
        yield
    except Signalled as stop:
        us.tell(int(stop.args[0]))
        raise
    except BaseException as error:
        us.tell(error)
        raise
    finally:
        us.close()
        ranks.team.remove(us)


def pieces(flat: Arrays) -> list[list[str]]:
    """Names of arrays that are summed together."""
    ends = accumulate(values.size for values in flat.values())
    parts = groupby(zip(ends, flat, strict=True), lambda part: part[0] // PIECE)
    return [[name for _, name in part] for _, part in parts]
