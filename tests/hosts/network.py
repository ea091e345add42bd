"""Two hosts on one machine: network namespaces joined by a pair of virtual interfaces, each with folders of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
INTERFACE = "veth-hosts"
ADDRESSES, PORT = ("10.77.0.1", "10.77.0.2"), "29511"


class Network:
    """Two namespaces, which `close` removes. Raises OSError where this machine makes none."""

    def __init__(self):
        self.names = [f"hosts-{os.getpid()}-{k}" for k in range(2)]
        try:
            self._make()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise OSError(f"no network namespaces here ({getattr(error, 'stderr', None) or error})") from None

    def _make(self):
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        pair = f"link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}"
        ip(*pair.split())
        for k, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[k]}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                ip("-n", name, "link", "set", interface, "up")

    def set_link(self, state):
        """Cut the link ("down") or mend it ("up")."""
        ip("-n", self.names[1], "link", "set", INTERFACE, state)

    def start(self, k, words, private=None, launcher=(), script=None):
        """Host k's launcher of one process of a script, whose words follow its name.

        private: (folder, what host k has in its place), by a mount that nobody else sees. script: to start instead of
        the project's.
        """
        name, *flags = words
        rendezvous = launcher or (f"--node_rank={k}", f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", *rendezvous]
        command += [*([script] if script else []), ROOT / f"{name}.py", *flags]
        mount = 'mount --bind "$1" "$0" && shift && exec "$@"'
        bound = ["bash", "-c", mount, private[0], private[1]] if private else []
        env = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            list(map(str, ["ip", "netns", "exec", self.names[k], *bound, *command])),
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def close(self):
        """End what still runs there, and remove the namespaces."""
        for name in self.names if shutil.which("ip") else ():
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in listed.stdout.split():
                os.kill(int(process), 9)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*words):
    """Run ip(8)."""
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
