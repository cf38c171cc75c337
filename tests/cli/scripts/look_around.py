"""Tells what a script can see of how it was started, then does what its first argument says."""

import os
import sys

print(__name__, __file__, __spec__ and __spec__.name, vars(sys.modules["__main__"]) is globals())
print(sys.argv, sys.path, sys.flags, sys.excepthook, sys.orig_argv[1:], sys._getframe().f_back and __spec__ is None)
print(sorted(os.environ.items()), sorted(sys.path_importer_cache))
print(*sorted({name.partition(".")[0] for name in sys.modules} - {"atexit", "sitecustomize"}))
print("on standard error", file=sys.stderr)


def fail():
    try:
        return {}["missing"]
    except KeyError as error:
        raise ValueError("of the script's own") from error


match sys.argv[1:]:
    case ["exit", code, *_]:
        sys.exit(int(code))
    case ["fail", *_]:
        fail()
    case ["wait", *_]:
        print("ready", flush=True)
        __import__("time").sleep(600)
