"""The verbs: name, module and one line of help. Listing them imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb.

    Attributes:
        name: what is typed; two words for a verb of a group.
        module: where its function `command` is.
        help: one line.
    """

    name: str
    module: str
    help: str


_ALL = (
    Verb("demo", "steer.cli.demo", "the whole loop on the bundled organism, a minute and a half"),
    Verb("doctor", "steer.cli.doctor", "versions, devices, back ends, and whether steering does something here"),
    Verb("inspect", "steer.cli.inspect", "what a model is made of and which forms of change fit it; from headers"),
    Verb("generate", "steer.cli.generate", "write replies: to the terminal, or many into a run folder"),
    Verb("serve", "steer.cli.serve", "vLLM's own server, with a folder of steerings that requests choose from"),
    Verb("evaluate", "steer.cli.evaluate", "answer a task: accuracy, lengths and closure, with intervals"),
    Verb("collect", "steer.cli.collect", "read a model over the traces of a run, once, into a summary"),
    Verb("probe length", "steer.cli.probe.length", "the direction from short to long thoughts"),
    Verb("probe contrast", "steer.cli.probe.contrast", "the direction from wrong to right replies, a control vector"),
    Verb("probe efficiency", "steer.cli.probe.efficiency", "the direction from long to short right replies"),
    Verb("probe heads", "steer.cli.probe.heads", "how much each attention head writes against a direction"),
    Verb("probe experts", "steer.cli.probe.experts", "which experts of a mixture fire where thinking opens or closes"),
    Verb("probe effects", "steer.cli.probe.effects", "what steerings do beside what they are for, with controls"),
    Verb(
        "probe trajectory", "steer.cli.probe.trajectory", "how thoughts move, and whether that tells right from wrong"
    ),
    Verb("patch thinkedit", "steer.cli.patch.thinkedit", "take a direction out of what chosen heads can write"),
    Verb("patch experts", "steer.cli.patch.experts", "turn chosen experts of a mixture up, down or off"),
    Verb("patch direction", "steer.cli.patch.direction", "a steering as a patch of weights, where it has that form"),
    Verb("patch difference", "steer.cli.patch.difference", "what one checkpoint has beyond another, to add elsewhere"),
    Verb("apply", "steer.cli.apply", "write a patched checkpoint"),
    Verb("revert", "steer.cli.revert", "give a patched checkpoint its original weights back"),
    Verb("diff", "steer.cli.diff", "which tensors of two checkpoints differ, by how much and of which rank"),
    Verb("merge", "steer.cli.merge", "merge models by a recipe of mergekit's format"),
    Verb("verify", "steer.cli.verify", "measure whether two subjects are the same model"),
    Verb("export", "steer.cli.export", "hand a change to other programs: a LoRA adapter, a control vector"),
    Verb("import", "steer.cli.take_in", "take in what others made: texts, logs of lm-eval, control vectors"),
)
VERBS: dict[str, Verb] = {verb.name: verb for verb in _ALL}
GROUPS: dict[str, str] = {
    "probe": "find directions and scores in what a model does",
    "patch": "make changes of weights, as small files",
}
