"""Runs one command in the emulated KVM host: the machine's half of serve.py.

    client.py STATE run KVM_HOST SHARES FIXED COMMAND…
    client.py STATE status | down

SHARES and FIXED are directories, joined by ':': those that both sides may change,
and those that never change. STATE holds `port` and `token` of the emulated host that is up. Where none answers,
`run` lets `KVM_HOST up` start one and tries again. Exit statuses: the command's own
(128+n for signal n), or 125 with a sentence when it was not run to its end.
"""

import fcntl
import json
import os
import secrets
import select
import signal
import socket
import stat
import struct
import sys
import termios
import threading
import time
import tty

NOT_RUN = 125
ATTEMPTS = 3
ANSWER_SECONDS = 60
CHUNK = 1 << 18
ADDRESS = "127.0.0.1"
STREAMS = ("stdin", "stdout", "stderr")
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Gone(Exception):
    """No emulated host answers, or not any longer."""


class Host:
    """The emulated host that STATE describes."""

    def __init__(self, state):
        try:
            with open(state + "/port") as file:
                self.port = int(file.read())
            with open(state + "/token") as file:
                self.token = file.read().strip()
        except (OSError, ValueError) as error:
            raise Gone from error

    def connect(self, hello):
        hello = json.dumps({"token": self.token, **hello}).encode()
        try:
            sock = socket.create_connection((ADDRESS, self.port), timeout=30)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(struct.pack(">I", len(hello)) + hello)
            sock.settimeout(None)
        except OSError as error:
            raise Gone from error
        return sock


class Control:
    """The control connection: lines of JSON both ways."""

    def __init__(self, sock):
        self.sock = sock
        self.buffer = b""

    def next(self):
        while b"\n" not in self.buffer:
            try:
                part = self.sock.recv(65536)
            except TimeoutError:
                raise
            except OSError:
                part = b""
            if not part:
                raise Gone
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def say(self, message):
        try:
            self.sock.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass


def run(state, kvm_host, shares, fixed, argv):
    hello = command_hello(shares, fixed, argv)
    for _ in range(ATTEMPTS):
        try:
            control, streams = begin(Host(state), hello)
            break
        except Gone:
            # Standard output is the command's.
            if os.spawnvp(os.P_WAIT, "/bin/sh", ["sh", "-c", '"$0" up </dev/null >&2', kvm_host]) != 0:
                return NOT_RUN
    else:
        complain("the emulated host does not stay up: see scripts/kvm-host console-log")
        return NOT_RUN

    # From here on the command has begun: there is no second try.
    try:
        return carry(control, streams, hello["terminals"])
    except Gone:
        complain("the emulated host ended while the command ran; the end of its console:")
        sys.stderr.writelines(last_words(state))
        return NOT_RUN


def last_words(state):
    """The end of what the emulated host and QEMU said, without what every guest makes KVM say."""
    # Whoever waits for QEMU says last how it ended.
    for _ in range(20):
        try:
            with open(os.path.join(state, "console"), errors="replace") as console:
                lines = [line for line in console if "Unhandled WRMSR" not in line]
        except OSError as e:
            return [f"{e}\n"]
        if lines and "QEMU ended" in lines[-1]:
            break
        time.sleep(0.1)
    return lines[-40:]


def command_hello(shares, fixed, argv):
    """All that the emulated host must know of the command and of where it is called."""
    # One pseudo-terminal for those descriptors that are the terminal; the others, a
    # file that takes standard error, say, stay what they are.
    terminals = [fd for fd in range(3) if os.isatty(fd)]
    # `2>&1` outside is one stream inside as well, or their order would be lost.
    same = is_open(1) and is_open(2) and os.path.sameopenfile(1, 2)
    streams = ["terminal"] if terminals else []
    for fd, name in enumerate(STREAMS):
        if fd not in terminals and is_open(fd) and not is_null(fd) and not (fd == 2 and same):
            streams.append(name)
    return {
        "kind": "run",
        "session": secrets.token_hex(8),
        "streams": streams,
        "stderr_is_stdout": same,
        "terminal": window(terminals[0]) if terminals else None,
        "terminals": terminals,
        # Whose line discipline makes CR LF of LF: ours, or that of the other side.
        "raw": reads_keys(terminals),
        "argv": argv,
        "env": dict(os.environ),
        "cwd": os.getcwd(),
        "umask": umask(),
        "share": [path for path in shares.split(":") if path],
        "fixed": [path for path in fixed.split(":") if path],
        "packages": packages(),
    }


def begin(host, hello):
    """Connects; the command has begun when this returns."""
    control = Control(host.connect(hello))
    named = {"kind": "stream", "session": hello["session"]}
    streams = {name: host.connect({**named, "name": name}) for name in hello["streams"]}
    control.sock.settimeout(ANSWER_SECONDS)
    try:
        first = control.next()
    except TimeoutError:
        complain(f"the emulated host has not answered for {ANSWER_SECONDS} s: try scripts/kvm-host down")
        sys.exit(NOT_RUN)
    control.sock.settimeout(None)
    if "error" in first:
        complain(first["error"])
        sys.exit(NOT_RUN)
    return control, streams


def carry(control, streams, terminals):
    forward_signals(control, terminals)
    ours = raw = None
    downloads = []
    try:
        if reads_keys(terminals):
            ours = termios.tcgetattr(0)
            tty.setraw(0)
            raw = termios.tcgetattr(0)
            start(upload, 0, streams["terminal"])
        elif "stdin" in streams:
            start(upload, 0, streams["stdin"])
        if terminals:
            # What is typed is echoed even where no output goes to the terminal.
            shown = next(fd for fd in (1, 2, 0) if fd in terminals)
            downloads.append(start(download, streams["terminal"], shown))
        for fd, name in ((1, "stdout"), (2, "stderr")):
            if name in streams:
                downloads.append(start(download, streams[name], fd))
        while "exit" not in (message := control.next()):
            pass
        for thread in downloads:
            thread.join()
        return message["exit"]
    finally:
        # A pager behind us may have set the terminal to its own needs meanwhile.
        if raw and termios.tcgetattr(0) == raw:
            termios.tcsetattr(0, termios.TCSADRAIN, ours)


def reads_keys(terminals):
    """Whether keys reach us: in the background they are somebody else's."""
    try:
        return 0 in terminals and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        # Not the terminal that this session is under: nobody's jobs are there.
        return True


def start(carry_one, source, target):
    thread = threading.Thread(target=carry_one, args=(source, target), daemon=True)
    thread.start()
    return thread


def upload(fd, sock):
    """Standard input, to its end or until nobody reads it any longer."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(sock, select.POLLRDHUP)
    try:
        while True:
            ready = dict(poll.poll())
            if sock.fileno() in ready:
                return
            part = os.read(fd, CHUNK)
            if not part:
                break
            sock.sendall(part)
    except OSError:
        pass
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def download(sock, fd):
    try:
        while part := sock.recv(CHUNK):
            view = memoryview(part)
            while view:
                view = view[os.write(fd, view) :]
    except OSError:
        # Nobody reads our output: the command is to learn it as it would here.
        sock.close()


def forward_signals(control, terminals):
    for number in FORWARDED:
        signal.signal(number, lambda number, _: control.say({"signal": number}))
    if terminals:
        signal.signal(signal.SIGWINCH, lambda *_: control.say({"window": window(terminals[0])}))


def window(terminal):
    rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(terminal, termios.TIOCGWINSZ, b"\0" * 8))
    return [rows, columns]


def umask():
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def packages():
    """Changes whenever Debian packages come or go."""
    try:
        return os.stat("/var/lib/dpkg/status").st_mtime_ns
    except OSError:
        return 0


def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False


def is_null(fd):
    status = os.fstat(fd)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)


def complain(sentence):
    sys.stderr.write(f"kvm-host: {sentence}\n")


def main():
    state, action, *rest = sys.argv[1:]
    if action == "run":
        kvm_host, shares, fixed, *argv = rest
        return run(state, kvm_host, shares, fixed, argv)
    try:
        control = Control(Host(state).connect({"kind": action}))
        # The answer to `down` is the end of the connection.
        print(json.dumps(control.next()))
        return 0
    except Gone:
        return 0 if action == "down" else NOT_RUN


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    sys.stdout.flush()
    # Threads may wait for input that never comes: leave without them.
    os._exit(status)
