"""A real single-node Kubernetes for development, without Docker: `python k8s/dev/cluster.py up|down|status|able`.

Where docker and kind are, kind makes the cluster; the rest of this file is for where they are not.

Needs Linux, root and Go >= 1.24; what else is missing it installs with apt-get (`machine.PROGRAMS`).
The Kubernetes programs are built from Go's module system (`k8s/dev/cluster/go.mod`) once and cached
outside the repository. Only the standard library is used, so that `make cluster-up` works before
anything is installed.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import machine
import programs
from machine import (
    BRIDGE,
    GATEWAY,
    PODS,
    STATE,
    ClusterError,
    birth,
    call,
    running,
    say,
    start,
    stop,
    wait_for,
    write,
)

HERE = Path(__file__).resolve().parent
SERVICES = "10.96.0.0/16"
DNS_ADDRESS, NODE, API_PORT, ETCD_PORT = "10.96.0.10", "dev-node", 6443, 12379
API = f"https://{GATEWAY}:{API_PORT}"
TOKENS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
    "proxy": ("system:kube-proxy", ""),
}
# --- identities ------------------------------------------------------------------------------


def make_identities() -> dict[str, str]:
    """CA, serving and client certificates, service-account key, tokens; returns tokens by name."""
    pki = STATE / "pki"
    pki.mkdir(parents=True, exist_ok=True)
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost"]
    addresses = [GATEWAY, "10.96.0.1", "127.0.0.1"]
    san = ",".join([*(f"DNS:{n}" for n in names), *(f"IP:{a}" for a in addresses)])
    new = ["-newkey", "rsa:2048", "-nodes", "-days", "30"]
    call("openssl", "req", "-x509", *new, "-keyout", f"{pki}/ca.key", "-out", f"{pki}/ca.crt",
         "-subj", "/CN=rlaifv-dev-ca")  # fmt: skip
    signed = {
        "server": ("/CN=kube-apiserver", f"subjectAltName={san}"),
        "kubelet-client": (
            "/O=system:masters/CN=apiserver-kubelet-client",
            "extendedKeyUsage=clientAuth",
        ),
        "node": (f"/CN={NODE}", f"subjectAltName=IP:{GATEWAY},DNS:{NODE}"),
    }
    for name, (subject, extension) in signed.items():
        call("openssl", "req", "-x509", *new, "-CA", f"{pki}/ca.crt", "-CAkey", f"{pki}/ca.key",
             "-keyout", f"{pki}/{name}.key", "-out", f"{pki}/{name}.crt", "-subj", subject,
             "-addext", extension, "-addext", "basicConstraints=CA:FALSE")  # fmt: skip
    call("openssl", "genrsa", "-out", f"{pki}/accounts.key", "2048")
    tokens = {name: secrets.token_hex(16) for name in TOKENS}
    rows = [f'{tokens[n]},{user},{n},"{group}"' for n, (user, group) in TOKENS.items()]
    write(pki / "tokens.csv", "\n".join(rows) + "\n")
    for name, token in tokens.items():
        write(STATE / f"{name}.kubeconfig", json.dumps(kubeconfig(token), indent=1))
    return tokens


def kubeconfig(token: str) -> dict[str, object]:
    cluster = {"server": API, "certificate-authority": f"{STATE}/pki/ca.crt"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "dev",
        "clusters": [{"name": "dev", "cluster": cluster}],
        "users": [{"name": "dev", "user": {"token": token}}],
        "contexts": [{"name": "dev", "context": {"cluster": "dev", "user": "dev"}}],
    }


# --- the cluster -----------------------------------------------------------------------------


def start_control_plane(folder: Path) -> None:
    pki = f"{STATE}/pki"
    peer = f"http://127.0.0.1:{ETCD_PORT + 1}"
    client = f"http://127.0.0.1:{ETCD_PORT}"
    start("etcd", "etcd", "--data-dir", f"{STATE}/etcd", "--unsafe-no-fsync",
          "--listen-client-urls", client, "--advertise-client-urls", client,
          "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
          "--initial-cluster", f"default={peer}")  # fmt: skip
    start("apiserver", f"{folder}/kube-apiserver", f"--etcd-servers={client}",
          f"--advertise-address={GATEWAY}", f"--bind-address={GATEWAY}", f"--secure-port={API_PORT}",
          f"--service-cluster-ip-range={SERVICES}", "--authorization-mode=Node,RBAC",
          "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
          f"--client-ca-file={pki}/ca.crt", f"--tls-cert-file={pki}/server.crt",
          f"--tls-private-key-file={pki}/server.key", f"--token-auth-file={pki}/tokens.csv",
          f"--kubelet-client-certificate={pki}/kubelet-client.crt",
          f"--kubelet-client-key={pki}/kubelet-client.key",
          "--kubelet-preferred-address-types=InternalIP",
          f"--kubelet-certificate-authority={pki}/ca.crt",
          "--service-account-issuer=https://kubernetes.default.svc",
          f"--service-account-key-file={pki}/accounts.key",
          f"--service-account-signing-key-file={pki}/accounts.key")  # fmt: skip
    wait_for(
        "the API server",
        lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok",
        seconds=180,
    )
    start("controller-manager", f"{folder}/kube-controller-manager",
          f"--kubeconfig={STATE}/controller-manager.kubeconfig", "--use-service-account-credentials",
          f"--service-account-private-key-file={pki}/accounts.key", f"--root-ca-file={pki}/ca.crt",
          "--leader-elect=false")  # fmt: skip
    start("scheduler", f"{folder}/kube-scheduler", f"--kubeconfig={STATE}/scheduler.kubeconfig",
          "--leader-elect=false")  # fmt: skip


def start_node(folder: Path) -> None:
    kubelet = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",
        "failSwapOn": False,
        "enforceNodeAllocatable": [],
        "featureGates": {"KubeletInUserNamespace": True},
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "makeIPTablesUtilChains": False,
        "containerRuntimeEndpoint": f"unix://{STATE}/containerd/containerd.sock",
        "authentication": {"x509": {"clientCAFile": f"{STATE}/pki/ca.crt"}},
        "tlsCertFile": f"{STATE}/pki/node.crt",
        "tlsPrivateKeyFile": f"{STATE}/pki/node.key",
        "resolvConf": "/etc/resolv.conf",
        "evictionHard": {
            "nodefs.available": "1%",
            "memory.available": "100Mi",
            "imagefs.available": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "podLogsDir": f"{STATE}/pod-logs",
        "podPidsLimit": 4096,
    }
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clusterCIDR": PODS,
        "hostnameOverride": NODE,
        "clientConnection": {"kubeconfig": f"{STATE}/proxy.kubeconfig"},
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }
    write(STATE / "kubelet.json", json.dumps(kubelet, indent=1))
    write(STATE / "proxy.json", json.dumps(proxy, indent=1))
    start("kubelet", f"{folder}/kubelet", f"--config={STATE}/kubelet.json",
          f"--kubeconfig={STATE}/kubelet.kubeconfig", f"--root-dir={STATE}/kubelet",
          f"--node-ip={GATEWAY}", f"--hostname-override={NODE}")  # fmt: skip
    start("proxy", f"{folder}/kube-proxy", f"--config={STATE}/proxy.json")
    ready = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
    wait_for(
        "the node", lambda: kubectl("get", "nodes", "-o", ready, check=False) == "True", seconds=180
    )


def start_dns(folder: Path) -> None:
    """CoreDNS as a host process on the bridge; a Service without selector leads to it."""
    write(STATE / "Corefile", f"""
.:1053 {{
  bind {GATEWAY}
  errors
  kubernetes cluster.local {{
    kubeconfig {STATE}/admin.kubeconfig dev
    ttl 1
  }}
  forward . /etc/resolv.conf
}}
""")  # fmt: skip
    start("dns", f"{folder}/coredns", "-conf", f"{STATE}/Corefile")
    ports = [
        {"name": n, "port": 1053, "protocol": p} for n, p in (("dns", "UDP"), ("dns-tcp", "TCP"))
    ]
    metadata = {"name": "kube-dns", "namespace": "kube-system"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "clusterIP": DNS_ADDRESS,
            "ports": [p | {"port": 53, "targetPort": 1053} for p in ports],
        },
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata | {"labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": "IPv4",
        "ports": ports,
        "endpoints": [{"addresses": [GATEWAY]}],
    }
    for thing in (service, endpoints):
        kubectl("apply", "-f", "-", stdin=json.dumps(thing))


def kubectl(*words: str, stdin: str | None = None, check: bool = True) -> str:
    program = str(programs.build() / "kubectl")
    return call(program, f"--kubeconfig={STATE}/admin.kubeconfig", *words, stdin=stdin, check=check)


def up(owner: int | None = None) -> None:
    """Starts everything; with `owner`, ends it as soon as that process has ended."""
    machine.need_root()
    if running("apiserver") and running("kubelet"):
        say(f"is up: export KUBECONFIG={STATE}/admin.kubeconfig")
        return
    down()
    machine.install_packages()
    folder = programs.build()
    started = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    if owner is not None:
        start("watchdog", sys.executable, __file__, "watch", str(owner))
    make_identities()
    machine.make_network()
    machine.start_containerd()
    start_control_plane(folder)
    start_node(folder)
    start_dns(folder)
    ready = "jsonpath={.metadata.name}"
    account = ("get", "serviceaccount", "default", "-o", ready)
    wait_for(
        "the default account", lambda: kubectl(*account, check=False) == "default", seconds=180
    )
    say(f"up in {time.monotonic() - started:.1f} s: export KUBECONFIG={STATE}/admin.kubeconfig")


def watch(owner: int) -> None:
    born = birth(owner)
    while born and birth(owner) == born:
        time.sleep(1)
    say(f"process {owner} has ended, and the cluster with it")
    down()


def down() -> None:
    """Stops what `up` started, by its own ids, and removes mounts, bridge, rules and state."""
    if not STATE.exists():
        return
    if running("watchdog") != os.getpid():
        stop("watchdog")
    if running("apiserver") and running("kubelet"):
        with contextlib.suppress(ClusterError, subprocess.SubprocessError):
            # Not waited for: a Job's pods keep a finalizer until a controller that may hang is done.
            now = ("--grace-period=0", "--force", "--wait=false", "--request-timeout=10s")
            kubectl("delete", "pods", "--all", "-A", *now, check=False)
    stop("kubelet")
    machine.stop_containers()
    for name in (
        "proxy",
        "dns",
        "scheduler",
        "controller-manager",
        "apiserver",
        "etcd",
        "containerd",
    ):
        stop(name)
    machine.unmount()
    for table in ("ip kube-proxy", "ip6 kube-proxy"):
        call("nft", "delete", "table", *table.split(), check=False)
    machine.remove_masquerade()
    machine.remove_cgroups()
    call("ip", "link", "delete", BRIDGE, check=False)
    machine.remove_records()
    shutil.rmtree(STATE, ignore_errors=True)
    if left := machine.leftovers():
        raise ClusterError("still there after all was stopped:\n" + "\n".join(left))
    say("down: no process, mount, bridge or rule is left")


def able() -> None:
    """Whether a cluster can be had here; the reason why not is for people."""
    if os.environ.get("KUBECONFIG") or machine.kind_answers():
        return
    machine.need_all()


def status() -> None:
    names = (
        "etcd",
        "apiserver",
        "controller-manager",
        "scheduler",
        "containerd",
        "kubelet",
        "proxy",
        "dns",
    )
    for name in names:
        pid = running(name)
        sys.stdout.write(f"{name:20} {f'running, process {pid}' if pid else 'not running'}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = {
        "able": lambda: able(),
        "setup": lambda: programs.setup(),
        "build": lambda: programs.build(),
        "up": lambda: up(flags.owner),
        "load": lambda: machine.load_image(flags.what),
        "watch": lambda: watch(int(flags.what)),
        "status": lambda: status(),
        "down": lambda: down(),
    }
    if machine.kind_answers():
        commands |= {
            "up": lambda: machine.kind_up(),
            "load": lambda: machine.kind_load(flags.what),
            "down": lambda: machine.kind_down(),
        }
    parser.add_argument("command", choices=list(commands))
    parser.add_argument("what", nargs="?", help="load: an image in podman's storage")
    parser.add_argument("--owner", type=int, help="up: end the cluster when this process ends")
    flags = parser.parse_args()
    try:
        commands[flags.command]()
    except ClusterError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
