"""Runs tests in rooms of carrel's, and shows what they report as if they had run here.

    this process: collect, select ──▶ group (test | module | session)
        └─ carrel runner … python -m pytest NODEIDS ──▶ in the room: Inside writes each report as a line of JSON
    this process: ◀── the file comes back ── reports ──▶ pytest_runtest_logreport

With --carrel-initialised every room is a clone of one in which pytest has collected: what is to run there comes through standard input, for a
clone's arguments and variables are those of the room that it was taken from.

Reports are made and read by pytest's own hooks for that (pytest_report_to_serializable), which pytest-xdist uses too. They are text from a
stranger: nothing of them is executed, whatever pytest relies on is looked at first, and a line that is no report is a failure of its test.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile

import pytest

from . import carrel_clone

INSIDE = "CARREL_PYTEST_REPORT"
# That a room asks for its tests when it has collected.
ASKS = "CARREL_PYTEST_ASKS"
# Where it asks: standard input, which capturing takes away before any hook could have it.
TESTS = os.dup(0) if os.environ.pop(ASKS, None) else None
REPORT = "/tmp/carrel-pytest-report.jsonl"
# More of what a room said is cut from a failure's text.
TAIL = 8000
# What a room may report: a terminal is not the place for more.
LARGEST_REPORT = 64 << 20


def pytest_addoption(parser):
    group = parser.getgroup("carrel", "tests in microVMs")
    group.addoption("--carrel", action="store_true", help="run each test in a microVM of its own")
    group.addoption(
        "--carrel-scope",
        choices=("test", "module", "session"),
        default="test",
        help="what has a microVM together (default: test)",
    )
    group.addoption(
        "--carrel-initialised",
        "--carrel-initialized",
        action="store_true",
        help="collect once: every microVM begins as a clone of one in which the tests are imported",
    )
    group.addoption(
        "--carrel-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further option of `carrel runner`, such as --memory=1g",
    )
    group.addoption(
        "--carrel-runner",
        default=os.environ.get("CARREL_PYTEST_RUNNER", "carrel runner"),
        metavar="COMMAND",
        help="in place of `carrel runner`",
    )


def pytest_configure(config):
    # Once: tests may run pytest themselves.
    inside = os.environ.pop(INSIDE, None)
    if inside:
        config.pluginmanager.register(Inside(config, inside), "carrel-inside")
    elif config.getoption("carrel"):
        if config.getoption("usepdb"):
            raise pytest.UsageError("--pdb can't be used with --carrel: nobody can type into a test's room")
        config.pluginmanager.register(Outside(config), "carrel-outside")


class Inside:
    """In the room: asks for its tests, if it has to, and writes down what is reported."""

    def __init__(self, config, path):
        self.config = config
        self.file = open(path, "w", encoding="utf-8")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session):
        """Everything is imported, and nothing has run: here clones are taken."""
        if TESTS is None:
            return
        await_clone()
        with open(TESTS, "rb") as asked:
            wanted = json.loads(asked.readline())
        items = {item.nodeid: item for item in session.items}
        # One that is not there has no report, which is said outside.
        session.items[:] = [items[nodeid] for nodeid in wanted if nodeid in items]

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.file.write(json.dumps(data) + "\n")
        # A test that kills its interpreter has told of its set-up.
        self.file.flush()

    def pytest_unconfigure(self):
        self.file.close()


class Outside:
    """On this host: groups, runs and shows."""

    def __init__(self, config):
        self.config = config
        self.runner = shlex.split(config.getoption("carrel_runner"))
        self.scope = config.getoption("carrel_scope")
        self.initialised = config.getoption("carrel_initialised")
        # Of one group: its key, reports by node ID, what went wrong, the node ID of its last test.
        self.results = None

    def pytest_report_header(self):
        begun = ", a clone of one that has collected" if self.initialised else ""
        return f"carrel: a microVM for each {self.scope}{begun}, by `{shlex.join(self.runner)}`"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        del nextitem
        key = self.key(item)
        if self.results is None or self.results[0] != key:
            # Groups come one after the other: what another one left is read.
            nodeids = [one.nodeid for one in self.group(item, key)]
            self.results = (key, *self.run(nodeids), nodeids[-1])
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        _, reports, broken, last = self.results
        for report in self.complete(item, reports.get(item.nodeid, []), broken, item.nodeid == last):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def key(self, item):
        if self.scope == "test":
            return item.nodeid
        return str(item.path) if self.scope == "module" else "session"

    def group(self, item, key):
        if self.scope == "test" or "PYTEST_XDIST_WORKER" in os.environ and self.scope == "session":
            # A worker of pytest-xdist has been given this test, and perhaps not the next.
            return [item]
        return [one for one in item.session.items if self.key(one) == key]

    def run(self, nodeids):
        """Runs tests in one room. Returns their reports by node ID, and what went wrong with the room, if anything did."""
        with tempfile.TemporaryDirectory(prefix="carrel-pytest-") as folder:
            back = os.path.join(folder, "report.jsonl")
            command = self.command(nodeids, back)
            live = self.config.getoption("capture") == "no"
            streams = {} if live else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            asked = {"input": json.dumps(nodeids).encode() + b"\n"} if self.initialised else {"stdin": subprocess.DEVNULL}
            try:
                done = subprocess.run(command, **asked, **streams)
            except OSError as error:
                raise pytest.UsageError(f"carrel can't be run ({error}): install it, or see --carrel-runner")
            said = (done.stdout or b"").decode("utf-8", "replace")
            reports, damaged = self.read(back)
        # 0: passed; 1: some failed; 5: none was selected, which their absence says.
        if done.returncode in (0, 1, 5) and not damaged:
            return reports, None
        return reports, f"{damaged or ended(done.returncode)}\n{said[-TAIL:]}"

    def command(self, nodeids, back):
        config = self.config
        begin, tests = [], [os.path.join(config.rootpath, nodeid) for nodeid in nodeids]
        if self.initialised:
            # The same for all: it is what the template is made for.
            begin = ["--initialised", f"--env={ASKS}=1", "--unset-env=PYTEST_XDIST_*"]
            tests = config.option.file_or_dir
        return [
            *self.runner,
            *["--quiet", f"--with={config.rootpath}", f"--dir={config.invocation_params.dir}"],
            *[f"--env={INSIDE}={REPORT}", f"--return={REPORT}:{back}"],
            *begin,
            *config.getoption("carrel_option"),
            *["--", sys.executable, "-m", "pytest", "-p", "carrel_pytest.plugin"],
            # Tests that are selected by what failed here are named one by one: the room has no memory of its own.
            # Without the plugin the setting is unknown, and may be an error.
            *(["-o", "cache_dir=/tmp/carrel-pytest-cache"] if config.pluginmanager.hasplugin("cacheprovider") else []),
            f"--rootdir={config.rootpath}",
            *self.arguments(),
            # A project's own settings may ask for workers: a room's tests have one another's company alone.
            *(["-n0"] if config.pluginmanager.hasplugin("xdist") else []),
            *tests,
        ]

    def arguments(self):
        """What pytest was called with here, but for paths and what is about rooms and workers."""
        paths = list(self.config.option.file_or_dir)
        kept, skip = [], False
        takes_value = ("--carrel-scope", "--carrel-option", "--carrel-runner", "-n", "--numprocesses", "--dist", "--tx", "--maxprocesses", "--rootdir")
        for argument in map(str, self.config.invocation_params.args):
            name = argument.split("=", 1)[0]
            if skip:
                skip = False
            elif argument in paths:
                paths.remove(argument)
            elif name in takes_value:
                skip = "=" not in argument
            elif name != "--carrel" and not (argument[:2] == "-n" and argument[2:].isalnum()):
                kept.append(argument)
        return kept

    def read(self, path):
        """Reports by node ID, and what is wrong with them."""
        reports = {}
        try:
            if os.path.getsize(path) > LARGEST_REPORT:
                return {}, "The room reported more than anybody could read."
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    data = checked(json.loads(line))
                    report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
                    # What can't be shown is found here, and not in the midst of the summary.
                    str(report.longreprtext)
                    reports.setdefault(report.nodeid, []).append(report)
        except FileNotFoundError:
            pass
        except Exception as error:  # pytest asserts on what it reads, and a stranger wrote it.
            return reports, f"The room reported something that is no test's report: {error}"
        return reports, None

    def complete(self, item, reports, broken, last):
        """A test's reports; where its room ended before it, or, with the last test of a room, badly after it, one more that says so."""
        if reports and reports[-1].when == "teardown":
            if not (broken and last):
                return reports
            when = "teardown"
        else:
            when = "call" if reports else "setup"
        why = broken or "The room ended well, and said nothing of this test."
        failure = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={item.name: 1},
            outcome="failed",
            longrepr=why,
            when=when,
        )
        return [*reports, failure]


def await_clone():
    """Comes back in each clone, with generators of random numbers seeded anew; where this is not going to be cloned, at once (docs/agent.md, "The call")."""
    if not os.path.exists(carrel_clone.SOCKET):
        return
    connection = carrel_clone.Connection()
    connection.socket.sendall(b"ready\n")
    who = None
    while who is None:
        # However long it takes until there is a clone.
        connection.socket.setblocking(True)
        connection.receive()
        connection.socket.setblocking(False)
        who = connection.cloned()
    carrel_clone.reseed(bytes.fromhex(who["entropy"]))


def checked(data):
    """A report's data, of which every part that pytest relies on is of the kind that it takes; what is unknown is left out."""

    def is_number(value):
        return type(value) in (int, float) and math.isfinite(value)

    def is_list_of(value, *kinds):
        return isinstance(value, list) and len(value) == len(kinds) and all(map(isinstance, value, kinds))

    def is_place(value):
        return is_list_of(value, str, (int, type(None)), str)

    def is_failure(value):
        if not isinstance(value, dict):
            return value is None or isinstance(value, str) or is_list_of(value, str, int, str)
        crash = value.get("reprcrash")
        kinds = {"path": str, "lineno": int, "message": str}
        return crash is None or isinstance(crash, dict) and all(isinstance(crash.get(name), kind) for name, kind in kinds.items())

    def is_pairs(value, kind):
        return isinstance(value, list) and all(is_list_of(pair, str, kind) for pair in value)

    parts = {
        "$report_type": lambda value: value == "TestReport",
        "nodeid": lambda value: isinstance(value, str),
        "outcome": lambda value: value in ("passed", "failed", "skipped"),
        "when": lambda value: value in ("setup", "call", "teardown"),
        "location": is_place,
        "keywords": lambda value: isinstance(value, dict),
        "longrepr": is_failure,
        "sections": lambda value: is_pairs(value, str),
        "user_properties": lambda value: is_pairs(value, object),
        "duration": is_number,
        "start": is_number,
        "stop": is_number,
        "wasxfail": lambda value: isinstance(value, str),
    }
    optional = ("start", "stop", "wasxfail")
    for name, is_sound in parts.items():
        if (name in data or name not in optional) and not is_sound(data[name]):
            raise ValueError(f"its {name} is {str(data[name])[:80]!r}")
    # JSON has lists alone; pytest tells tuples from them.
    tuples = {name: tuple(data[name]) for name in ("location", "longrepr") if isinstance(data[name], list)}
    pairs = {name: [tuple(pair) for pair in data[name]] for name in ("sections", "user_properties")}
    return {name: value for name, value in data.items() if name in parts} | tuples | pairs


def ended(status):
    """How the runner ended, in words."""
    number = -status if status < 0 else status - 128
    if status < 0 or 128 < status < 192:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return f"The test's room was ended by {name} before the test was over."
    words = {
        124: "The test's room ran out of its time.",
        125: "carrel could not run the test's room.",
        127: "The interpreter is not in the test's room.",
    }
    return words.get(status, f"The test's room ended with status {status} before the test was over.")
