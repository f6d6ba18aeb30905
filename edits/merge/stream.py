"""The numbers of one merged tensor, piece by piece: each method's formula on what a reader brings.

Every method goes through pieces of the same bounds as its in-memory form would with one piece, element by element;
what needs the whole tensor first (the edge of TIES, the norms of DARE, the angle of slerp) is found in passes of its
own over the same pieces, so memory does not grow with the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from edits.merge.job import Job, Term
from edits.merge.methods import consensus, linear, slerp, task_arithmetic, ties
from edits.merge.methods.dare import Mask, drop_, factor
from edits.merge.pieces import Reader

Note = dict[str, object]
Streams = Callable[[Job, Reader, Note], Iterator[Tensor]]


def changes(job: Job) -> bool:
    """Whether what `STREAMS` yields is a change, to be added to the base, and not the merged numbers."""
    return job.method in _CHANGES


def _linear(job: Job, reader: Reader, note: Note) -> Iterator[Tensor]:
    first = len(job.sources) - len(job.terms)
    weights = [term.weight for term in job.terms]
    for pieces in reader.pieces(*range(first, len(job.sources))):
        yield linear.linear_(pieces, weights, job.total)


def _slerp(job: Job, reader: Reader, note: Note) -> Iterator[Tensor]:
    mixed = slerp.mix(job.t, (slerp.products(first, second) for first, second in reader.pieces()))
    note |= {"angle": round(mixed.cosine, 9), "straight": mixed.straight}
    for first, second in reader.pieces():
        yield slerp.slerp_(first, second, mixed)


def _task_arithmetic(job: Job, reader: Reader, note: Note) -> Iterator[Tensor]:
    weights = [term.weight for term in job.terms]
    for base, *models in reader.pieces():
        deltas = [model.sub_(base) for model in models]
        yield task_arithmetic.change_(deltas, weights, job.total, job.scale)


def _ties(job: Job, reader: Reader, note: Note) -> Iterator[Tensor]:
    edges = []
    for source, term in enumerate(job.terms, start=1):
        deltas = partial(_deltas, reader, source)
        edge = ties.find_edge(deltas, reader.count, term.density)
        edges.append(ties.rescaled(edge, deltas) if job.rescale and edge is not ties.ALL else edge)
    note["ties"] = sum(edge.ties for edge in edges)
    weights, seen = [term.weight for term in job.terms], [0] * len(edges)
    for base, *models in reader.pieces():
        deltas_ = [model.sub_(base) for model in models]
        for at, (delta, edge) in enumerate(zip(deltas_, edges, strict=True)):
            seen[at] += ties.trim_(delta, edge, seen[at])
        yield consensus.agreed_(deltas_, weights, job.normalize, job.scale)


def _dare(job: Job, reader: Reader, note: Note) -> Iterator[Tensor]:
    chances = [
        factor(partial(_deltas, reader, source), _mask(job, term), job.rescale)
        for source, term in enumerate(job.terms, start=1)
    ]
    masks, weights = [_mask(job, term) for term in job.terms], [term.weight for term in job.terms]
    for base, *models in reader.pieces():
        deltas = [
            drop_(model.sub_(base), mask, chance) for model, mask, chance in zip(models, masks, chances, strict=True)
        ]
        if job.method == "dare_ties":
            yield consensus.agreed_(deltas, weights, job.normalize, job.scale)
        else:
            yield task_arithmetic.change_(deltas, weights, job.total, job.scale)


def _mask(job: Job, term: Term) -> Mask:
    return Mask(job.seed, job.name, term.place, term.density)


def _deltas(reader: Reader, source: int) -> Iterator[Tensor]:
    for base, model in reader.pieces(0, source):
        yield model.sub_(base)


STREAMS: dict[str, Streams] = {
    "linear": _linear,
    "cast": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": _dare,
    "dare_ties": _dare,
}
_CHANGES = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
