"""Begins the runtime client, and makes a clone of it another one.

A function may be cloned while it waits for its first event (docs/agent.md, "The call"). Memory is the
same in every clone, generators of random numbers too. The kernel's is seeded anew by then; this seeds
those that live in the interpreter, before the handler sees the event, and calls what the function
registered with snapshot_restore_py.

What stays the same in every clone: the seed of str's hash, what a library or the function itself drew
or seeded before. Whoever needs more registers a callable with snapshot_restore_py.register_after_restore.
"""

import os
import sys

SOCKET = "/run/carrel/clone.sock"
# How long the agent may take to answer the first line, s.
PATIENCE = 10


class Connection:
    """The agent's words: a line for each cloning, there before the first instruction after it."""

    def __init__(self):
        # Here, not in each clone.
        import hashlib, json, socket  # noqa: F401

        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(SOCKET)
        self.socket.sendall(b"subscribe\n")
        self.unread = b""
        # Who this is now: nothing was drawn before.
        while b"\n" not in self.unread:
            self.receive()
        self.unread = self.unread.split(b"\n", 1)[1]
        self.socket.setblocking(False)

    def receive(self):
        said = self.socket.recv(1 << 16)
        if not said:
            raise ConnectionError("the agent closed the clone socket: this may be a clone that doesn't know it")
        self.unread += said

    def cloned(self):
        """The newest identity since the last call, or None."""
        try:
            while True:
                self.receive()
        except BlockingIOError:
            pass
        *lines, self.unread = self.unread.split(b"\n")
        if not lines:
            return None
        import json

        return json.loads(lines[-1])


def reseed(entropy):
    """Seeds the generators of those modules that were imported; each with bytes of its own."""
    import hashlib

    def seed(name):
        return hashlib.sha512(entropy + name.encode()).digest()

    loaded = sys.modules.get
    if random := loaded("random"):
        random.seed(seed("random"))
    if tempfile := loaded("tempfile"):
        # It draws names from a generator of its own, made when it is missing.
        tempfile._name_sequence = None
    if ssl := loaded("ssl"):
        ssl.RAND_add(seed("ssl"), 64.0)
    if numpy := loaded("numpy.random"):
        words = memoryview(seed("numpy")).cast("I")
        numpy.seed(list(words))


def follow(connection, client, hooks):
    """Has the runtime client look for a cloning whenever it comes back with an event."""
    wait = client.wait_next_invocation
    first = True

    def wait_next_invocation(self):
        nonlocal first
        if first:
            first = False
            hooks.run_before_snapshot()
        request = wait(self)
        if who := connection.cloned():
            reseed(bytes.fromhex(who["entropy"]))
            hooks.run_after_restore()
        return request

    client.wait_next_invocation = wait_next_invocation


def main(arguments):
    # Only where a function is to be cloned.
    connection = Connection() if os.path.exists(SOCKET) else None
    from awslambdaric import __main__ as runtime

    if connection:
        from awslambdaric import lambda_runtime_client, lambda_runtime_hooks_runner

        follow(connection, lambda_runtime_client.LambdaRuntimeClient, lambda_runtime_hooks_runner)
    runtime.main(arguments)


if __name__ == "__main__":
    main(sys.argv)
