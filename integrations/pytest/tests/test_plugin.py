"""The plugin against a runner that starts processes in place of rooms. What rooms do is tested with carrel itself."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from carrel_pytest.plugin import checked

SOURCE = Path(__file__).parent.parent / "src"
FAKE = Path(__file__).parent / "fake_runner.py"
KINDS = """
    import os, sys, pytest

    def test_passes():
        print("said in the room")

    def test_fails():
        print("said before it failed")
        assert 1 + 1 == 3, "arithmetic"

    @pytest.mark.skip(reason="not today")
    def test_skipped():
        pass

    @pytest.mark.xfail
    def test_expected():
        assert False

    @pytest.fixture
    def broken():
        raise RuntimeError("no fixture")

    def test_error(broken):
        pass

    @pytest.mark.parametrize("word", ["a b", "c::d"])
    def test_parameters(word):
        assert word
"""


@pytest.fixture
def rooms(pytester, monkeypatch, tmp_path):
    """Runs pytest with rooms; call it with arguments. `rooms.log` lists what ran in each."""
    log = tmp_path / "rooms"
    log.touch()
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setenv("FAKE_ROOMS", str(log))
    monkeypatch.delenv("CARREL_PYTEST_REPORT", raising=False)
    runner = shlex.join([sys.executable, str(FAKE)])

    def run(*arguments):
        own = ("-p", "carrel_pytest.plugin", "--carrel", f"--carrel-runner={runner}")
        return pytester.runpytest_subprocess(*own, *arguments)

    run.log = lambda: log.read_text().splitlines()
    return run


def test_results_are_the_tests_own(pytester, rooms):
    pytester.makepyfile(KINDS)
    result = rooms()
    result.assert_outcomes(passed=3, failed=1, errors=1, skipped=1, xfailed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*said before it failed*"])
    result.stdout.fnmatch_lines(["*arithmetic*"])
    result.stdout.fnmatch_lines(["*no fixture*"])
    assert "said in the room" not in result.stdout.str()
    assert len(rooms.log()) == 7


@pytest.mark.parametrize(("scope", "expected"), [("test", 4), ("module", 2), ("session", 1)])
def test_a_scope_has_a_room_together(pytester, rooms, scope, expected):
    body = "def test_one(): pass\ndef test_two(): pass\n"
    pytester.makepyfile(test_a=body, test_b=body)
    rooms(f"--carrel-scope={scope}").assert_outcomes(passed=4)
    assert len(rooms.log()) == expected


def test_selection_and_stopping_are_pytests(pytester, rooms):
    pytester.makepyfile(KINDS)
    rooms("-k", "passes or skipped").assert_outcomes(passed=1, skipped=1, deselected=5)
    result = rooms("-x")
    result.assert_outcomes(passed=1, failed=1)
    assert len(rooms.log()) == 4
    assert rooms("-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_what_failed_last_is_selected_here(pytester, rooms):
    pytester.makepyfile(KINDS)
    rooms()
    rooms("--lf").assert_outcomes(failed=1, errors=1)


def test_options_and_paths_reach_the_room(pytester, rooms):
    pytester.makeconftest("def pytest_addoption(parser): parser.addoption('--flavour', default='plain')")
    sub = pytester.mkdir("sub")
    (sub / "test_flavour.py").write_text("def test_it(request): assert request.config.getoption('flavour') == 'odd'\n")
    rooms("--flavour=odd", "sub").assert_outcomes(passed=1)
    rooms("--flavour", "odd", "sub/test_flavour.py::test_it").assert_outcomes(passed=1)


def test_output_is_shown_at_once_without_capture(pytester, rooms):
    pytester.makepyfile(KINDS)
    result = rooms("-s", "-k", "passes")
    result.stdout.fnmatch_lines(["*said in the room*"])


def test_an_interpreter_that_dies_fails_its_test_alone(pytester, rooms):
    pytester.makepyfile(
        "import os, signal\n"
        "def test_dies(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def test_exits(): os._exit(0)\n"
        "def test_lives(): pass\n"
    )
    result = rooms()
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*ended by SIGSEGV before the test was over*"])
    result.stdout.fnmatch_lines(["*said nothing of this test*"])


def test_a_room_that_can_not_be_had_fails_its_tests(pytester, rooms):
    pytester.makepyfile("def test_one(): pass")
    result = rooms("--carrel-option=--fail=125")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*carrel could not run the test's room*"])
    result = rooms("--carrel-runner=/no/such/carrel")
    assert result.ret == pytest.ExitCode.USAGE_ERROR or "carrel can't be run" in result.stdout.str() + result.stderr.str()


SOUND = {
    "$report_type": "TestReport",
    "nodeid": "test_it.py::test_forges",
    "location": ["test_it.py", 0, "test_forges"],
    "keywords": {},
    "outcome": "passed",
    "longrepr": None,
    "when": "teardown",
    "sections": [],
    "user_properties": [],
    "duration": 0.1,
}
CRASH = {"path": "p", "lineno": 1, "message": "m"}


def test_a_sound_report_is_taken():
    assert checked(SOUND)["location"] == ("test_it.py", 0, "test_forges")
    assert "other" not in checked({**SOUND, "other": 7})
    assert checked({**SOUND, "longrepr": {"reprcrash": CRASH}})["longrepr"] == {"reprcrash": CRASH}


@pytest.mark.parametrize(
    "part",
    [
        {"$report_type": 7},
        {"$report_type": "CollectReport"},
        {"outcome": 7},
        {"outcome": "well"},
        {"when": ["call"]},
        {"nodeid": None},
        {"location": ["a", "b", "c"]},
        {"location": []},
        {"keywords": []},
        {"sections": [["a"]]},
        {"sections": [["a", 7]]},
        {"user_properties": "abc"},
        {"duration": "1"},
        {"duration": True},
        {"duration": float("nan")},
        {"wasxfail": 7},
        {"longrepr": 7},
        {"longrepr": {"reprcrash": {**CRASH, "message": 7}}},
    ],
    ids=str,
)
def test_a_report_of_another_form_is_none(part):
    with pytest.raises(ValueError):
        checked({**SOUND, **part})


@pytest.mark.parametrize("part", [{"outcome": 7}, {"longrepr": {"reprcrash": CRASH, "reprtraceback": {"reprentries": 7}}}], ids=str)
def test_what_is_no_report_is_a_failure_of_its_test(pytester, rooms, part):
    forged = json.dumps({**SOUND, **part})
    pytester.makepyfile(
        test_it="import os\n"
        "def test_forges(pytestconfig):\n"
        "    path = pytestconfig.pluginmanager.get_plugin('carrel-inside').file.name\n"
        f"    open(path, 'a').write({forged!r} + '\\n')\n"
        "    os._exit(0)\n"
    )
    result = rooms("-rA")
    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_what_goes_wrong_after_a_test_is_its_error(pytester, rooms):
    pytester.makepyfile(
        "import atexit, os\n"
        "def test_one(): atexit.register(os._exit, 9)\n"
        "def test_two(): pass\n"
    )
    rooms("--carrel-scope=module").assert_outcomes(passed=2, errors=1)


def test_reasons_for_skipping_are_shown(pytester, rooms):
    pytester.makepyfile("import pytest\n@pytest.mark.skip(reason='not today')\ndef test_one(): pass\n")
    result = rooms("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*not today"])


def test_a_debugger_is_refused(pytester, rooms):
    pytester.makepyfile("def test_one(): pass")
    result = rooms("--pdb")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--pdb can't be used*"])


def test_workers_have_rooms_too(pytester, rooms):
    pytest.importorskip("xdist")
    pytester.makepyfile(KINDS)
    rooms("-n", "2").assert_outcomes(passed=3, failed=1, errors=1, skipped=1, xfailed=1)
    assert len(rooms.log()) == 7


def test_settings_that_ask_for_workers_do_so_here_and_in_no_room(pytester, rooms):
    pytest.importorskip("xdist")
    pytester.makeini("[pytest]\naddopts = -n 2 -v")
    pytester.makepyfile("def test_alone(testrun_uid, request): assert not hasattr(request.config, 'workerinput')")
    rooms().assert_outcomes(passed=1)
    (room,) = rooms.log()
    assert "'-n0'" in room


def test_rooms_that_have_collected_get_their_tests_afterwards(pytester, rooms):
    pytester.makepyfile(KINDS)
    result = rooms("--carrel-initialised")
    result.assert_outcomes(passed=3, failed=1, errors=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["carrel: *a clone of one that has collected*", "*said before it failed*"])
    # A template is made for a line: nothing in it tells one test from another.
    log = rooms.log()
    assert len(log) == 7 and len(set(log)) == 1
    rooms("--carrel-initialised", "-k", "passes or c::d").assert_outcomes(passed=2, deselected=5)
    rooms("--carrel-initialised", "--carrel-scope=module").assert_outcomes(passed=3, failed=1, errors=1, skipped=1, xfailed=1)


def test_a_test_that_a_room_does_not_find_fails(pytester, rooms):
    pytester.makepyfile("import os\nif not os.environ.get('FAKE_INSIDE'):\n    def test_here(): pass\ndef test_both(): pass\n")
    result = rooms("--carrel-initialised", "--carrel-option=--env=FAKE_INSIDE=1")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*said nothing of this test*"])


@pytest.mark.parametrize("more", [(), ("--carrel-initialised",)])
def test_pytest_that_a_test_runs_is_its_own(pytester, rooms, more):
    pytester.makeconftest("pytest_plugins = 'pytester'")
    pytester.makepyfile(
        "import pytest\n"
        "@pytest.mark.parametrize('how', ['inprocess', 'subprocess'])\n"
        "def test_inner(pytester, how):\n"
        "    pytester.makepyfile('def test_one(): pass\\ndef test_two(): assert False')\n"
        "    getattr(pytester, 'runpytest_' + how)('-p', 'carrel_pytest.plugin').assert_outcomes(passed=1, failed=1)\n"
    )
    rooms(*more).assert_outcomes(passed=2)


def test_without_the_option_nothing_changes(pytester, rooms):
    pytester.makepyfile("def test_one(): pass")
    pytester.runpytest_subprocess("-p", "carrel_pytest.plugin").assert_outcomes(passed=1)
    assert rooms.log() == []
    assert os.environ.get("CARREL_PYTEST_REPORT") is None
