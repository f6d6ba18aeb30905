"""vLLM's `serve` command, as its program runs it: `python -m steer.backends.vllm.server.launch serve MODEL …`.

vLLM's program itself asks for the version of a distribution called vllm, which its builds for processors are not.
"""

from __future__ import annotations

import os


def main() -> None:
    """Run `serve` with the arguments of this process."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # As vLLM's program does: its engine has threads.
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    commands = parser.add_subparsers(required=True, dest="subparser")
    for command in cmd_init():
        command.subparser_init(commands).set_defaults(command=command)
    arguments = parser.parse_args()
    arguments.command.validate(arguments)
    arguments.command.cmd(arguments)


if __name__ == "__main__":
    main()
