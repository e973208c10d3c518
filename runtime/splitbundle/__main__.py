"""The command ``splitbundle``, also as ``python -m splitbundle``.

From the moment at which ``run`` begins, an interruption ends it with status 130 and without a traceback, and so does a
second one. That is why this module imports the others inside a function.
"""

from __future__ import annotations

import sys


def run() -> int:
    """Run the command with the arguments of the process, and return its exit status."""
    try:
        import atexit
        import os
        import signal

        numbers, came = (signal.SIGINT, signal.SIGTERM), False

        def interrupt(*_: object) -> None:
            nonlocal came
            if came:  # who sends a second one doesn't want to wait
                os._exit(130)
            came = True
            raise KeyboardInterrupt

        def ignore() -> None:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)

        # This is called last, as it is registered first. After it, Python would forget its handlers, and libraries take
        # up to a second to end: a signal would change the status.
        atexit.register(ignore)
        for number in numbers:
            signal.signal(number, interrupt)
        # A thread of OpenMP that waits for work would keep its core busy, and a process beside this one would wait for
        # that core. So it sleeps after a fifth of a millisecond, and fewer threads compute where that is faster. If
        # their number mustn't change, they sleep at once. spec/decisions/0016 has measurements. OpenMP reads this when
        # torch is loaded, and this process is ours.
        if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
            from splitbundle.giving_way import give_way

            os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
            # A stage server takes the pinned kernels, unless it is told otherwise.
            steady = any(argument.startswith(("--kernels", "serve-stage")) for argument in sys.argv)
            if not steady and "SPLITBUNDLE_KERNELS" not in os.environ:
                os.environ["GOMP_SPINCOUNT"] = "20000"
                give_way()
        # gRPC writes lines of its own to stderr, about connections that fail. The commands say that themselves.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        from splitbundle.cli.main import main

        status = main()
    except KeyboardInterrupt:  # before the command had its own handler
        if "--json" in sys.argv[1:]:
            problem = '{"code": "interrupted", "expected": "to finish", "got": "an interruption"}'
            sys.stdout.write(f'{{"ok": false, "problems": [{problem}]}}\n')
        sys.stderr.write("splitbundle: [interrupted] expected to finish, got an interruption\n")
        status = 130
    for number in numbers:  # the process may have to wait for threads now; a signal ends that
        signal.signal(number, lambda *_: os._exit(status))
    return status


if __name__ == "__main__":
    sys.exit(run())
