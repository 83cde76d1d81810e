"""Runs scripts in copies of a process that has imported their packages, which alone takes 4 s of CPU.

    python3 fork_server.py FD        FD: one end of a pair of Unix sockets of packets

A packet asks for a run, with what conftest.run puts in it and the descriptors of its stdout and stderr; another answers
it, with the exit status, when it has ended. Nothing is computed before a copy is made, because threads that
torch had started would be missing in it.
"""
import atexit
import gc
import importlib.util
import json
import os
import socket
import sys
import types
from pathlib import Path

status = 0  # of this process when it ends


@atexit.register  # the first, and so the last that is called
def end() -> None:
    """End the process without taking all objects apart, which takes 0.3 s."""
    sys.stdout.flush()
    os._exit(status)


def import_packages() -> None:
    """Import what the scripts do, as on a machine without an NPU: a copy of a process cannot use one."""
    sys.modules["torch_npu"] = None
    import common  # noqa: F401
    import librosa.sequence  # noqa: F401
    import transformers

    for name in ("GenerationConfig", "WhisperForConditionalGeneration", "WhisperProcessor"):
        getattr(transformers, name)  # which imports it
    del sys.modules["torch_npu"]
    gc.freeze()  # else each copy would copy the memory of all objects, only to count their references


def next_run(connection: socket.socket) -> dict:
    """What to run; returns once for each run, in a process of its own."""
    while True:
        packet, outputs, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not packet:
            sys.exit()
        pid = os.fork()
        if pid == 0:
            connection.close()
            for number, output in enumerate(outputs, start=1):
                os.dup2(output, number)
                os.close(output)
            return json.loads(packet)
        for output in outputs:
            os.close(output)
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def execute(argv: list[str], environment: dict[str, str], cwd: str) -> None:
    """Do what `python3 *argv` does in this environment and folder."""
    global status
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    is_code = argv[0] == "-c"
    folder, name = ("", "<string>") if is_code else (os.path.dirname(argv[0]), argv[0])
    sys.argv = ["-c", *argv[2:]] if is_code else argv
    sys.path[:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if importlib.util.find_spec("torch_npu"):  # transformers asks for it once, when it is imported
        for module in [module for module in sys.modules if module.partition(".")[0] == "transformers"]:
            del sys.modules[module]
    source = argv[1] if is_code else Path(name).read_text(encoding="utf-8")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__, status = name, 1
    try:
        exec(compile(source, name, "exec"), vars(main))
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise


if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    import_packages()
    execute(**next_run(socket.socket(fileno=int(sys.argv[1]))))
