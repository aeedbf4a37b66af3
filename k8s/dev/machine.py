"""Processes, network and containers of the development cluster, and their removal."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE = Path(os.environ.get("RLAIFV_DEV_CACHE", "~/.cache/rlaifv-dev")).expanduser()
STATE = Path("/var/lib/rlaifv-dev")
BRIDGE, GATEWAY, PODS = "rlaifv0", "10.244.0.1", "10.244.0.0/24"
PAUSE = """
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void stop(int s) { (void)s; _exit(0); }
static void reap(int s) { (void)s; while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) { signal(SIGTERM, stop); signal(SIGINT, stop); signal(SIGCHLD, reap); for (;;) pause(); }
"""


PROGRAMS = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "etcd": "etcd-server",
    "iptables": "iptables",
    "nft": "nftables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "podman": "podman",
    "openssl": "openssl",
    "mmdebstrap": "mmdebstrap",
    "gcc": "gcc",
}
"""What is needed besides Go, and Debian's package that has it."""
DAEMONS = {
    *("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"),
    *("kube-proxy", "coredns", "containerd", "containerd-shim-runc-v2"),
}
TRIES = 4
KIND = "rlaifv-dev"


class ClusterError(RuntimeError):
    """Something a person has to mend; the message says what."""


def say(text: str) -> None:
    sys.stderr.write(f"cluster: {text}\n")


def call(*command: str, stdin: str | None = None, check: bool = True) -> str:
    """Runs a command; raises ClusterError with its own words when it fails."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ClusterError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def wait_for(what: str, ready: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} is not ready after {seconds:.0f} s; see {STATE}/logs")
        time.sleep(0.2)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)


def need_root() -> None:
    if os.geteuid() != 0:
        raise ClusterError("root is needed (packages, bridge, mounts, containers)")


def need_all() -> None:
    """Raises ClusterError for what nobody but a person can change about this machine."""
    if sys.platform != "linux":
        raise ClusterError(f"Linux is needed, and this is {sys.platform}")
    need_root()
    if not shutil.which("go"):
        raise ClusterError("Go >= 1.24 is needed to build the Kubernetes programs")
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if missing and not shutil.which("apt-get"):
        raise ClusterError(f"missing: {', '.join(missing)} (names of Debian's packages)")


def install_packages() -> None:
    """What is missing, by apt-get; a mirror may fail for a moment, so more than once."""
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise ClusterError(f"missing: {', '.join(missing)} (names of Debian's packages)")
    say(f"installing {' '.join(missing)} ...")
    options = ("-y", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    for attempt in range(1, TRIES + 1):
        try:
            call("apt-get", "update", "-qq")
            call("apt-get", "install", *options, *missing)
            return
        except ClusterError as error:
            if attempt == TRIES:
                raise
            say(f"once more, after: {str(error)[-300:]}")
            time.sleep(10 * attempt)


# --- kind, where it is ------------------------------------------------------------------------


def kind_answers() -> bool:
    """Whether kind and an engine for it are here; then everything is its business."""
    if not (shutil.which("kind") and shutil.which("docker")):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def kubeconfig() -> Path:
    """Of the cluster that `up` makes here."""
    return CACHE / "kind.kubeconfig" if kind_answers() else STATE / "admin.kubeconfig"


def host() -> str:
    """This machine's address for pods."""
    if not kind_answers():
        return GATEWAY
    gateways = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
    found = call("docker", "network", "inspect", "--format", gateways, "kind").split()
    return next(address for address in found if "." in address)


def image(kind: str) -> str:
    """The name under which the cluster gets one of our images."""
    return f"rlaifv-{kind}:test" if kind_answers() else f"localhost/rlaifv-{kind}:test"


def kind_up() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    if KIND not in call("kind", "get", "clusters", check=False).split():
        call("kind", "create", "cluster", "--name", KIND, "--kubeconfig", str(kubeconfig()))
    say(f"is up: export KUBECONFIG={kubeconfig()}")


def kind_load(image: str) -> None:
    call("kind", "load", "docker-image", "--name", KIND, image)


def kind_down() -> None:
    call("kind", "delete", "cluster", "--name", KIND)


# --- processes -------------------------------------------------------------------------------


def start(name: str, *command: str) -> None:
    """Starts a daemon in a session of its own; its id and start time are kept for `down`."""
    logs = STATE / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    write(STATE / "pids" / name, f"{process.pid} {birth(process.pid)}")


def birth(pid: int) -> str:
    """Start time of a process in clock ticks: tells it from a later one of the same id."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def running(name: str) -> int | None:
    """The id of a daemon that we started and that still runs."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        pid, _, born = (STATE / "pids" / name).read_text().partition(" ")
        if born and birth(int(pid)) == born:
            return int(pid)
    return None


def stop(name: str, *, seconds: float = 3) -> None:
    pid = running(name)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while running(name) and time.monotonic() < deadline and not reaped(pid):
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    reaped(pid)


def reaped(pid: int) -> bool:
    """True when the process was our child and has ended, or is a zombie of somebody else's."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


# --- network and containers ------------------------------------------------------------------


def make_network() -> None:
    if BRIDGE not in call("ip", "-o", "link"):
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up", "promisc", "on")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    plugins = [
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": f"{STATE}/ipam",
                "ranges": [[{"subnet": PODS, "gateway": GATEWAY}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    network = {"cniVersion": "0.4.0", "name": "rlaifv-dev", "plugins": plugins}
    write(STATE / "cni" / "10-dev.conflist", json.dumps(network, indent=1))


def start_containerd() -> None:
    socket = f"{STATE}/containerd/containerd.sock"
    write(STATE / "containerd" / "config.toml", f"""
version = 2
root = "{STATE}/containerd/root"
state = "{STATE}/containerd/state"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:dev"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{STATE}/cni"
""")  # fmt: skip
    start("containerd", "containerd", "--config", f"{STATE}/containerd/config.toml")
    wait_for("containerd", lambda: bool(call(*ctr("version"), check=False)), seconds=120)
    if "localhost/pause:dev" not in call(*ctr("images", "list", "-q")):
        load_pause_image()


def ctr(*words: str) -> Sequence[str]:
    return (
        "ctr",
        "--address",
        f"{STATE}/containerd/containerd.sock",
        "--namespace",
        "k8s.io",
        *words,
    )


def load_pause_image() -> None:
    """The sandbox image of every pod: a static program that waits and reaps."""
    work = STATE / "pause"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    call("gcc", "-static", "-Os", "-x", "c", "-o", f"{work}/pause", "-", stdin=PAUSE)
    call("tar", "-C", str(work), "-cf", f"{work}/root.tar", "pause")
    call(
        "podman",
        "import",
        "--change",
        'ENTRYPOINT ["/pause"]',
        f"{work}/root.tar",
        "localhost/pause:dev",
    )
    load_image("localhost/pause:dev")


def load_image(name: str) -> None:
    """Copies an image from podman's storage into the cluster's, in one stream."""
    save = ["podman", "save", "--quiet", "--format", "docker-archive", name]
    with subprocess.Popen(save, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as source:
        done = subprocess.run(
            ctr("images", "import", "-"), stdin=source.stdout, capture_output=True, check=False
        )
        said = (source.communicate()[1] + done.stderr).decode(errors="replace")
    if source.returncode or done.returncode:
        raise ClusterError(f"image {name} is not loaded: {said.strip()}")


def stop_containers() -> None:
    if not running("containerd"):
        return
    for task in call(*ctr("tasks", "list", "-q"), check=False).split():
        call(*ctr("tasks", "kill", "-s", "SIGKILL", task), check=False)
        call(*ctr("tasks", "delete", "-f", task), check=False)
    for container in call(*ctr("containers", "list", "-q"), check=False).split():
        call(*ctr("containers", "delete", container), check=False)


def unmount() -> None:
    """Everything mounted below our state, deepest first, and the pods' network namespaces."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{STATE}/")), reverse=True):
        call("umount", "-l", mount, check=False)
    ours = {p.name for p in (STATE / "ipam").rglob("*")}
    for name in call("ip", "netns", "list", check=False).split("\n"):
        if name.startswith("cni-") and ours:
            call("ip", "netns", "delete", name.split()[0], check=False)


def remove_masquerade() -> None:
    """The chains that the bridge plugin made, one per pod that was not torn down."""
    rules = call("iptables", "-t", "nat", "-S", check=False).splitlines()
    for rule in (r for r in rules if r.startswith("-A POSTROUTING") and 'name: "rlaifv-dev"' in r):
        chain = rule.split(" -j ")[1].split()[0]
        number = rules_position(chain)
        call("iptables", "-t", "nat", "-D", "POSTROUTING", number, check=False)
        call("iptables", "-t", "nat", "-F", chain, check=False)
        call("iptables", "-t", "nat", "-X", chain, check=False)


def rules_position(chain: str) -> str:
    listing = call(
        "iptables", "-t", "nat", "-L", "POSTROUTING", "--line-numbers", "-n", check=False
    )
    return next((line.split()[0] for line in listing.splitlines() if chain in line), "0")


def remove_records() -> None:
    """What the kubelet and the bridge plugin keep outside our state: links to logs, results."""
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(f"{STATE}/"):
            link.unlink()
    for record in Path("/var/lib/cni/results").glob("rlaifv-dev-*"):
        record.unlink()


def leftovers() -> list[str]:
    """What there still is of a cluster: processes, mounts, bridge, rules, state."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            ours = Path(words[0]).name in DAEMONS
            if ours and any(f"{STATE}/" in word for word in words):
                found.append(f"process {folder.name}: {' '.join(words)[:200]}")
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    found += [f"mount {mount}" for mount in mounts if mount.startswith(f"{STATE}/")]
    lists = {
        f" {BRIDGE}:": ("ip", "-o", "link"),
        "kube-proxy": ("nft", "list", "tables"),
        "rlaifv-dev": ("iptables", "-t", "nat", "-S"),
    }
    for word, command in lists.items():
        lines = call(*command, check=False).splitlines() if shutil.which(command[0]) else []
        found += [f"{' '.join(command)}: {line}" for line in lines if word in line]
    return found + [str(path) for path in (STATE,) if path.exists()]


def remove_cgroups() -> None:
    """The pods' control groups, children first; one that is still in use stays."""
    for top in Path("/sys/fs/cgroup").glob("**/kubepods"):
        for folder in sorted((p for p in top.rglob("*") if p.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            top.rmdir()
