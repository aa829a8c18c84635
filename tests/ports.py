"""Ports for servers of the tests."""

import socket


def free_port() -> int:
    """Return a port that, for a minute, only a program that asks for it by its number gets.

    A port that was merely free may be given to another program, such as a test that runs beside
    this one, before the server of this test is there. After a connection it rests: the system
    chooses it for nobody, but one who names it and sets SO_REUSEADDR, as servers do, may have it.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()):
            accepted, _ = server.accept()
            accepted.close()  # the side that closes first is the one that rests
        port: int = server.getsockname()[1]
        return port
