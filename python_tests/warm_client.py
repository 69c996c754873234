"""Runs Python in a process that is forked from a warm one: warm_client.py SERVER ARGUMENTS.

It passes its descriptors, folder and variables on, forwards signals, and ends as that process ends.
"""

import json
import os
import signal
import socket
import struct
import sys

SIZE = struct.Struct("=q")  # as in warm_python.py
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def received(connection):
    parts = b""
    while len(parts) < SIZE.size:
        part = connection.recv(SIZE.size - len(parts))
        if not part:
            sys.exit("warm_client.py: the server has ended")
        parts += part
    return SIZE.unpack(parts)[0]


def main():
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    server, *arguments = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("\0" + server)
    request = {"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}
    message = json.dumps({**request, "session": False}).encode()
    socket.send_fds(connection, [SIZE.pack(len(message))], [0, 1, 2])
    connection.sendall(message)
    number = received(connection)
    for forwarded in FORWARDED:
        signal.signal(forwarded, lambda sent, _: os.kill(number, sent))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    code = os.waitstatus_to_exitcode(received(connection))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
