"""Stands for `carrel runner` where there are no microVMs: the same options, a process in place of a room."""

import os
import shutil
import subprocess
import sys
import tempfile

variables, back, folder, arguments = {}, [], None, sys.argv[1:]
while arguments:
    argument = arguments.pop(0)
    if argument == "--":
        break
    name, _, value = argument.partition("=")
    if name == "--env":
        key, _, text = value.partition("=")
        variables[key] = text
    elif name == "--return":
        back.append(value.rsplit(":", 1))
    elif name == "--dir":
        folder = value
    elif name == "--fail":
        sys.exit(int(value))
    elif name not in ("--quiet", "--with", "--initialised", "--unset-env"):
        sys.exit(125)
with open(os.environ["FAKE_ROOMS"], "a", encoding="utf-8") as log:
    log.write(repr(arguments) + "\n")
# Rooms share no files.
own = tempfile.mkdtemp(prefix="fake-room-")
for number, (path, _) in enumerate(back):
    inside = os.path.join(own, str(number))
    variables = {name: inside if value == path else value for name, value in variables.items()}
    back[number][0] = inside
done = subprocess.run(arguments, cwd=folder, env={**os.environ, **variables}, check=False)
for path, to in back:
    if os.path.exists(path):
        shutil.move(path, to)
shutil.rmtree(own)
sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
