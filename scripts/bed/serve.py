"""First process of the emulated KVM host: runs what the clients ask for.

In:  TCP connections from scripts/bed/client.py (QEMU forwards a port of the
     machine's loopback to PORT here). Each opens with one frame, `{"token", ...}`.
Out: for a command, one connection per stream, and on the control connection
     lines of JSON: {"started"}, then {"exit": status} or {"error": sentence}.

     control ──hello──> parked until its streams are there ──fork──> session
     stream  ──hello──> parked under its session's id         │
                                                              v
     client gone ─> HUP, CONT, then KILL to the group    command in a session
     command ends ─> streams drained ─> {"exit"}         (and terminal) of its own

The parent only accepts, parks and reaps; every command has a process of its own
here that pumps its streams, so that one command cannot hold up another. TCP gives
each stream its own flow control and end, which is why nothing is multiplexed.
"""

import fcntl
import json
import os
import selectors
import signal
import socket
import struct
import sys
import termios
import threading
import time

PORT = 7000
HERE = "/run/kvm-host"
MACHINE = HERE + "/machine"  # the machine's files, writable and fresh
SYSTEM = HERE + "/system"  # the same, read-only and cached
BUSYBOX = HERE + "/busybox"
HELLO_LIMIT = 8 << 20  # an environment may be large, but not endless
HELLO_SECONDS = 20
CHUNK = 1 << 20
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)
# Rooms that were left running (carrel run -d) are work, not idleness.
WORK = {b"carrel-vmm\n", b"carrel-owner\n", b"firecracker\n"}


def read_text(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


class Refused(Exception):
    """What the client is told instead of a start."""


# --- The parent: accepts, parks, shares, reaps -------------------------------


class Parked:
    """A connection whose hello is still coming in, or that waits for its session."""

    def __init__(self, sock):
        self.sock = sock
        self.since = time.monotonic()
        self.buffer = b""
        self.hello = None

    def feed(self):
        """Reads on; True once the hello is whole."""
        # The hello only: what follows it on the same connection is not ours.
        wanted = 4 if len(self.buffer) < 4 else 4 + struct.unpack(">I", self.buffer[:4])[0]
        if wanted > HELLO_LIMIT:
            raise Refused("the environment and the arguments are too large")
        part = self.sock.recv(min(CHUNK, wanted - len(self.buffer)))
        if not part:
            raise ConnectionResetError
        self.buffer += part
        if len(self.buffer) >= 4:
            wanted = 4 + struct.unpack(">I", self.buffer[:4])[0]
            if len(self.buffer) == wanted:
                self.hello = json.loads(self.buffer[4:])
                return True
        return False


class Server:
    def __init__(self):
        self.token = read_text(HERE + "/token").decode().strip()
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("0.0.0.0", PORT), backlog=128)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.parked = {}  # socket -> Parked
        self.controls = {}  # session id -> Parked
        self.streams = {}  # session id -> {name: Parked}
        self.sessions = set()  # pids
        self.shared = set()
        self.packages = None
        self.idle_limit = int(read_text(HERE + "/idle-seconds"))
        self.busy_at = time.monotonic()
        # SIGCHLD wakes the selector: children of children end up here, too.
        wake_read, wake_write = os.pipe()
        for fd in (wake_read, wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.wake = wake_read
        self.selector.register(wake_read, selectors.EVENT_READ)

    def run(self):
        while True:
            for key, _ in self.selector.select(timeout=5):
                if key.fileobj is self.listener:
                    self.accept()
                elif key.fileobj == self.wake:
                    os.read(self.wake, 4096)
                else:
                    self.read(self.parked[key.fileobj])
            self.reap()
            self.forget_the_slow()
            self.end_when_idle()

    def accept(self):
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.parked[sock] = Parked(sock)
        self.selector.register(sock, selectors.EVENT_READ)

    def read(self, parked):
        try:
            if parked.feed():
                self.greet(parked)
        except Refused as refusal:
            self.refuse(parked, str(refusal))
        except BlockingIOError:
            pass
        except (OSError, ValueError, KeyError, TypeError):
            self.drop(parked)

    def greet(self, parked):
        hello = parked.hello
        if hello["token"] != self.token:
            raise ValueError("a stranger")
        self.selector.unregister(parked.sock)
        self.busy_at = time.monotonic()
        kind = hello["kind"]
        if kind == "down":
            self.end()
        if kind == "status":
            self.answer_status(parked)
            return
        session = hello["session"]
        if kind == "stream":
            self.streams.setdefault(session, {})[hello["name"]] = parked
        else:
            self.controls[session] = parked
        control = self.controls.get(session)
        if control and set(control.hello["streams"]) <= set(self.streams.get(session, {})):
            self.start(session)

    def answer_status(self, parked):
        status = {
            "uptime": float(read_text("/proc/uptime").split()[0]),
            "commands": len(self.sessions),
            "rooms": rooms(),
            "shared": sorted(self.shared),
        }
        say(parked.sock, status)
        self.drop(parked)

    def start(self, session):
        control = self.controls.pop(session)
        streams = self.streams.pop(session, {})
        try:
            self.share(control.hello["share"], MACHINE)
            # Never written again, so no reader needs to ask for news: a microVM's
            # kernel stays in the page cache here, instead of being read for each.
            self.share(control.hello.get("fixed", []), SYSTEM)
            self.notice_packages(control.hello.get("packages"))
        except Refused as refusal:
            self.refuse(control, str(refusal))
            for stream in streams.values():
                self.drop(stream)
            return
        pid = os.fork()
        if pid == 0:
            # Only this session's own connections stay open in its process.
            mine = {control.sock} | {stream.sock for stream in streams.values()}
            for sock in set(self.parked) - mine:
                sock.close()
            self.listener.close()
            self.selector.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(self.wake)
            run_session(control.hello, control.sock, {n: s.sock for n, s in streams.items()})
            os._exit(0)
        self.sessions.add(pid)
        self.drop(control)
        for stream in streams.values():
            self.drop(stream)

    def share(self, paths, source):
        """Binds the machine's own directories over the overlay's copy of them."""
        for path in paths:
            covered = any(
                path == known or (source == MACHINE and path.startswith(known + "/")) for known in self.shared
            )
            if covered or not os.path.isdir(source + path):
                continue
            os.makedirs(path, exist_ok=True)
            if os.spawnv(os.P_WAIT, BUSYBOX, ["busybox", "mount", "--bind", source + path, path]) != 0:
                raise Refused(f"cannot share {path} with the emulated host")
            self.shared.add(path)

    def notice_packages(self, packages):
        """Drops what is cached of the machine's system when packages have changed."""
        if self.packages is not None and packages != self.packages:
            with open("/proc/sys/vm/drop_caches", "w") as file:
                file.write("3\n")
        self.packages = packages

    def refuse(self, parked, sentence):
        say(parked.sock, {"error": sentence})
        self.drop(parked)

    def drop(self, parked):
        if self.parked.pop(parked.sock, None):
            try:
                self.selector.unregister(parked.sock)
            except KeyError:
                pass
            parked.sock.close()

    def forget_the_slow(self):
        now = time.monotonic()
        for parked in list(self.parked.values()):
            if now - parked.since > HELLO_SECONDS:
                self.drop(parked)
        live = set(self.parked.values())
        self.controls = {s: p for s, p in self.controls.items() if p in live}
        self.streams = {
            s: kept
            for s, named in self.streams.items()
            if (kept := {n: p for n, p in named.items() if p in live})
        }

    def reap(self):
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.sessions.discard(pid)
            self.busy_at = time.monotonic()

    def end_when_idle(self):
        now = time.monotonic()
        if self.sessions or self.parked:
            self.busy_at = now
        elif now - self.busy_at > self.idle_limit:
            if rooms():
                self.busy_at = now
            else:
                print(f"kvm-host: idle for {self.idle_limit} s: ending", flush=True)
                self.end()

    def end(self):
        """Lets everything end, puts the store's disk to rest, and resets the machine."""
        self.listener.close()
        for sig, seconds in ((signal.SIGTERM, 2), (signal.SIGKILL, 1)):
            try:
                os.kill(-1, sig)
            except ProcessLookupError:
                break
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                try:
                    os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                time.sleep(0.02)
        for command in (["sync"], ["umount", "-r", "/var/lib/carrel"], ["reboot", "-f"]):
            os.spawnv(os.P_WAIT, BUSYBOX, ["busybox"] + command)


def rooms():
    """How many processes of rooms there are."""
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    return sum(read_text(f"/proc/{pid}/comm") in WORK for pid in pids)


def say(sock, message):
    try:
        sock.setblocking(True)
        sock.settimeout(10)
        sock.sendall(json.dumps(message).encode() + b"\n")
        sock.settimeout(None)
    except OSError:
        pass


# --- A session: one command ---------------------------------------------------


def run_session(hello, control, streams):
    os.setsid()
    for sock in [control, *streams.values()]:
        sock.setblocking(True)
    # Which of the standard descriptors are the terminal; the others are streams.
    window, terminals = hello.get("terminal"), hello.get("terminals", [0, 1, 2])
    null = os.open("/dev/null", os.O_RDWR)
    ends, pumps, awaited, master = [null, null, null], [], [], None
    if window:
        master, slave = os.openpty()
        set_window(master, window)
        if not hello.get("raw", True):
            leave_output(slave)
        for index in terminals:
            ends[index] = slave
        pumps = [Pump(copy, streams["terminal"], master), Pump(copy, master, streams["terminal"])]
        awaited = pumps[1:]
    for index, name in enumerate(("stdin", "stdout", "stderr")):
        if name not in streams:
            continue
        read_end, write_end = os.pipe()
        fcntl.fcntl(read_end, fcntl.F_SETPIPE_SZ, CHUNK)
        if name == "stdin":
            ends[index] = read_end
            pumps.append(Pump(splice, streams[name], write_end))
        else:
            ends[index] = write_end
            pumps.append(Pump(splice, read_end, streams[name]))
            awaited.append(pumps[-1])
    # `2>&1` outside is one stream here as well, or their order would be lost.
    if hello.get("stderr_is_stdout"):
        ends[2] = ends[1]

    pid = spawn(hello, control, ends, slave if window else None)
    for fd in {null, *ends}:
        os.close(fd)
    say(control, {"started": pid})
    for pump in pumps:
        pump.start()

    status = watch(pid, control, master)
    if status is None:
        end_group(pid)
        os._exit(0)
    for pump in awaited:
        pump.drain()
    say(control, {"exit": status})


class Pump(threading.Thread):
    """Carries one stream, one way, until either end is gone."""

    def __init__(self, carry, source, target):
        super().__init__(daemon=True)
        self.carry, self.source, self.target = carry, source, target

    def run(self):
        try:
            while self.carry(fileno(self.source), fileno(self.target)):
                pass
        except OSError:
            pass
        # Whoever still reads or writes there must hear that this stream is over.
        for end, how in ((self.source, socket.SHUT_RD), (self.target, socket.SHUT_WR)):
            if isinstance(end, socket.socket):
                try:
                    end.shutdown(how)
                except OSError:
                    pass
            elif self.carry is splice:
                os.close(end)

    def drain(self):
        """Waits for the stream's end, or, where a process that the command left
        behind holds it open, until what was written has been carried."""
        quiet = 0
        while quiet < 5:
            self.join(0.04)
            if not self.is_alive():
                return
            try:
                waiting = fcntl.ioctl(self.source, termios.FIONREAD, b"\0\0\0\0")
            except OSError:
                return
            quiet = 0 if any(waiting) else quiet + 1


def fileno(end):
    return end.fileno() if isinstance(end, socket.socket) else end


def splice(source, target):
    return os.splice(source, target, CHUNK)


def copy(source, target):
    part = os.read(source, 65536)
    view = memoryview(part)
    while view:
        view = view[os.write(target, view) :]
    return len(part)


def set_window(terminal, size):
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def leave_output(terminal):
    """For a client whose own terminal makes CR LF of LF already."""
    modes = termios.tcgetattr(terminal)
    modes[1] &= ~termios.OPOST
    termios.tcsetattr(terminal, termios.TCSANOW, modes)


def spawn(hello, control, ends, terminal):
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        for index, fd in enumerate(ends):
            os.dup2(fd, index)
        if terminal is not None:
            fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        # What is ignored here would be ignored by the command as well. (Descriptors
        # need no such care: Python's are closed on exec.)
        for sig in IGNORED:
            signal.signal(sig, signal.SIG_DFL)
        execute(hello)
    finally:
        os._exit(125)


def execute(hello):
    argv, env = hello["argv"], hello["env"]
    try:
        os.chdir(hello["cwd"])
    except OSError as error:
        complain(f"the working directory {hello['cwd']} is not there in the emulated host ({error.strerror})")
        os._exit(125)
    os.umask(hello["umask"])
    try:
        os.execvpe(argv[0], argv, env)
    except FileNotFoundError:
        complain(f"{argv[0]}: command not found")
        os._exit(127)
    except OSError as error:
        complain(f"{argv[0]}: {error.strerror}")
        os._exit(126)


def complain(sentence):
    os.write(2, f"kvm-host: {sentence}\n".encode())


def watch(pid, control, terminal):
    """Obeys the client until the command ends; its exit status, or None when the
    client has gone."""
    pidfd = os.pidfd_open(pid)
    selector = selectors.DefaultSelector()
    selector.register(pidfd, selectors.EVENT_READ)
    selector.register(control, selectors.EVENT_READ)
    buffer = b""
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if control in ready:
            try:
                part = control.recv(4096)
            except OSError:
                part = b""
            if not part:
                return None
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                obey(json.loads(line), pid, terminal)
        if pidfd in ready:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def obey(message, pid, terminal):
    if "window" in message and terminal is not None:
        set_window(terminal, message["window"])
    if "signal" in message:
        number = message["signal"]
        try:
            # What a keyboard or a shell's end would send goes to the whole group.
            if number in (signal.SIGUSR1, signal.SIGUSR2):
                os.kill(pid, number)
            else:
                os.killpg(pid, number)
        except ProcessLookupError:
            pass


def end_group(pid):
    for sig, pause in ((signal.SIGHUP, 0), (signal.SIGCONT, 1), (signal.SIGKILL, 0)):
        try:
            os.killpg(pid, sig)
        except ProcessLookupError:
            return
        until = time.monotonic() + pause
        while time.monotonic() < until:
            if os.waitpid(pid, os.WNOHANG)[0]:
                break
            time.sleep(0.05)


def main():
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    server = Server()
    print("kvm-host: ready", flush=True)
    server.run()


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:  # the end of the first process is the end of the host
        print(f"kvm-host: the server ended: {error!r}", file=sys.stderr, flush=True)
        raise
