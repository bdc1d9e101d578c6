"""A whole Kubernetes node out of nothing.

etcd, API server, controller manager, scheduler, containerd, kubelet, kube-proxy and CoreDNS run in network,
mount, process and host name namespaces of their own. Killing process 1 of these ends every process and
every mount at once, so that nothing of a node outlives it, however it ended. From outside, 127.0.0.1 and a
port of its own lead to the API server; `nsenter` leads to pods and Services.

What works on which machine, and why the settings are what they are: README.md in this folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.images import build as images
from tools.machine import run, say, system_path
from tools.node import config, crds, system_images
from tools.node.programs import (
    NODE_PROGRAMS,
    absent_programs,
    check_go,
    check_node,
    find_all,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[2]
DEFAULT_FOLDER = ROOT / "build" / "cluster"

# The kubelet sets these for the whole machine if they are different. It sees files that say what it wants.
KUBELET_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
# Of containers (with and without a cgroup parent) and of the kubelet.
CGROUPS = ("kubepods", "k8s.io")
CGROUP_ROOT = Path("/sys/fs/cgroup")


class NodeError(RuntimeError):
    """The node did not come up; the message says which part, and what it logged."""


_run = functools.partial(run, error=NodeError)


@dataclass(frozen=True)
class NodeState:
    """What is kept of a running node between two commands.

    init_pid: process 1 of the node, as the machine numbers it. started: the kernel's start time of it,
    against a number that was given again.
    """

    init_pid: int
    started: str
    port: int

    @property
    def is_alive(self) -> bool:
        """True while the node's process 1 runs."""
        return _start_time(self.init_pid) == self.started


class Node:
    """A node that keeps everything in one folder.

    folder: holds kubeconfig and logs/NAME.log of each part; all but the logs goes with the node.
    """

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = folder.absolute()
        self.kubeconfig = self.folder / "kubeconfig"
        self.logs = self.folder / "logs"
        self._state_path = self.folder / "state.json"
        self._parts: dict[str, subprocess.Popen[bytes]] = {}
        self._programs: dict[str, Path] = {}

    @property
    def state(self) -> NodeState | None:
        """What runs, or None."""
        try:
            state = NodeState(**json.loads(self._state_path.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return state if state.is_alive else None

    def up(self, archives: Sequence[Path] = (), timeout_s: float = 120.0) -> None:
        """Start the node, import images and return when pods can run and be found by name.

        archives: OCI archives with images. Raises MissingProgramError where this machine lacks
        something, and NodeError where a part does not come up in timeout_s.
        """
        plugins = check_node()
        self._programs = find_all()
        archives = [system_images.system_archive(), *archives]
        if self.state is not None:
            raise NodeError(f"a node runs in {self.folder} already: python -m tools.node down")
        _check_alone()
        self._clear()
        started = time.monotonic()
        deadline = started + timeout_s
        try:
            self._start(plugins, archives, deadline)
        except BaseException as error:
            message = f"{error}\n{self.tails()}" if isinstance(error, NodeError) else ""
            self.down()
            if message:
                raise NodeError(message) from error
            raise
        say(f"the node is ready after {time.monotonic() - started:.1f} s: KUBECONFIG={self.kubeconfig}")

    def down(self) -> None:
        """End the node and remove all of it but its logs."""
        state = self.state
        if state is not None:
            os.kill(state.init_pid, signal.SIGKILL)
            _poll(lambda: not state.is_alive, time.monotonic() + 30, "process 1 of the node to end")
        for part in self._parts.values():
            part.wait(timeout=30)
        self._parts.clear()
        _remove_cgroups(time.monotonic() + 30)
        self._clear(keep_logs=True)

    def enter(self, *command: str) -> list[str]:
        """Return the command that runs a command in the node's network: it reaches pods and Services."""
        return ["nsenter", f"--net=/proc/{self._running().init_pid}/ns/net", "--", *command]

    def import_images(self, archive: Path) -> None:
        """Make the images of an archive known to the node."""
        # All that the node holds is in memory: once is enough.
        how = ("--local", "--discard-unpacked-layers")
        self._inside("ctr", "--namespace=k8s.io", "images", "import", *how, str(archive), timeout_s=120)

    def tails(self, lines: int = 12) -> str:
        """Return the last lines of every part's log."""
        parts = []
        for path in sorted(self.logs.glob("*.log")):
            text = path.read_text(encoding="utf-8", errors="replace").splitlines()
            parts.append("\n".join([f"--- {path}", *text[-lines:]]))
        return "\n".join(parts)

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_s: float = 60.0) -> str:
        """Return what kubectl prints. Raises NodeError where it fails."""
        program = self._programs.get("kubectl") or find_all(("kubectl",))["kubectl"]
        command = [str(program), "--kubeconfig", str(self.kubeconfig), *arguments]
        return _run(command, timeout_s=timeout_s, stdin=stdin)

    def _running(self) -> NodeState:
        state = self.state
        if state is None:
            raise NodeError(f"no node runs in {self.folder}: python -m tools.node up")
        return state

    def _start(self, plugins: Path, archives: Sequence[Path], deadline: float) -> None:
        self._write_files(plugins)
        self._start_init(deadline)
        self._start_gate(deadline)
        self._write_certificates()
        binary = {name: str(path) for name, path in self._programs.items()}
        certificates = self.folder / "certificates"

        self._launch(
            "etcd",
            [
                binary["etcd"],
                "--data-dir=/var/lib/etcd",
                "--unsafe-no-fsync",
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--log-level=warn",
            ],
        )
        self._launch("containerd", [binary["containerd"], f"--config={self.folder / 'containerd.toml'}"])
        self._launch(
            "apiserver",
            [
                binary["kube-apiserver"],
                "--etcd-servers=http://127.0.0.1:2379",
                f"--advertise-address={config.NODE_ADDRESS}",
                f"--secure-port={config.API_PORT}",
                f"--service-cluster-ip-range={config.SERVICE_RANGE}",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged",
                f"--client-ca-file={certificates / 'ca.crt'}",
                f"--tls-cert-file={certificates / 'apiserver.crt'}",
                f"--tls-private-key-file={certificates / 'apiserver.key'}",
                f"--kubelet-certificate-authority={certificates / 'ca.crt'}",
                f"--kubelet-client-certificate={certificates / 'admin.crt'}",
                f"--kubelet-client-key={certificates / 'admin.key'}",
                "--kubelet-preferred-address-types=InternalIP",
                f"--service-account-key-file={certificates / 'ca.key'}",
                f"--service-account-signing-key-file={certificates / 'ca.key'}",
                "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
                # Further APIs, such as that of resource metrics.
                f"--requestheader-client-ca-file={certificates / 'ca.crt'}",
                "--requestheader-allowed-names=front-proxy",
                "--requestheader-username-headers=X-Remote-User",
                "--requestheader-group-headers=X-Remote-Group",
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
                f"--proxy-client-cert-file={certificates / 'front-proxy.crt'}",
                f"--proxy-client-key-file={certificates / 'front-proxy.key'}",
            ],
        )
        self._wait("containerd", lambda: self._succeeds("ctr", "version"), deadline)
        for archive in archives:
            self.import_images(archive)
        self._wait("apiserver", self._api_is_ready, deadline)
        self._launch(
            "controller-manager",
            [
                binary["kube-controller-manager"],
                f"--kubeconfig={self.folder / 'controller-manager.kubeconfig'}",
                f"--service-account-private-key-file={certificates / 'ca.key'}",
                f"--root-ca-file={certificates / 'ca.crt'}",
                f"--cert-dir={self.folder / 'scratch'}",
                "--use-service-account-credentials",
                "--leader-elect=false",
            ],
        )
        self._launch(
            "scheduler",
            [
                binary["kube-scheduler"],
                f"--kubeconfig={self.folder / 'scheduler.kubeconfig'}",
                f"--cert-dir={self.folder / 'scratch'}",
                "--leader-elect=false",
            ],
        )
        self._launch(
            "kubelet",
            [
                binary["kubelet"],
                f"--config={self.folder / 'kubelet.yaml'}",
                f"--kubeconfig={self.folder / 'kubelet.kubeconfig'}",
                f"--hostname-override={config.NODE_NAME}",
                f"--node-ip={config.NODE_ADDRESS}",
            ],
        )
        self._launch("proxy", [binary["kube-proxy"], f"--config={self.folder / 'proxy.yaml'}"])
        self.kubectl("apply", "--filename", "-", stdin=config.DNS_OBJECTS)
        self.kubectl("apply", "--filename", "-", stdin=json.dumps(config.storage_objects()))
        for wanted in (
            ("--for=create", f"node/{config.NODE_NAME}"),
            ("--for=condition=Ready", f"node/{config.NODE_NAME}"),
            ("--for=create", "serviceaccount/default"),
            ("--for=condition=Available", "deployment/coredns", "--namespace=kube-system"),
        ):
            left_s = max(deadline - time.monotonic(), 1.0)
            self._check_parts()
            self.kubectl("wait", *wanted, f"--timeout={left_s:.0f}s", timeout_s=left_s + 5)

    def _start_init(self, deadline: float) -> None:
        # Signals to reap are ignored, so that the kernel reaps what is left to process 1.
        script = f"trap '' CHLD\n{self._setup_script()}\ntouch {self.folder}/inside\nexec sleep infinity\n"
        command = [
            "unshare",
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "--fork",
            "--kill-child",
            "sh",
            "-ec",
            script,
        ]
        with (self.logs / "init.log").open("wb") as log:
            parent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"PATH": system_path()},
            )
        self._parts["init"] = parent
        self._wait("init", (self.folder / "inside").exists, deadline)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text(encoding="ascii").split()
        pid = int(children[0])
        self._write_state(NodeState(pid, _start_time(pid), 0))

    def _setup_script(self) -> str:
        """Return the commands that make the node's mounts and network; they run as its process 1."""
        folder = self.folder
        lines = [
            "mount --make-rprivate /",
            "mount -t proc proc /proc",
            f"hostname {config.NODE_NAME}",
            "mount -t tmpfs tmpfs /run",
            # Images, volumes and data in memory (about 1.5 GiB): no trace in the machine's own places, and
            # gone at once, where removing ten thousand files takes half a minute.
            "mount -t tmpfs tmpfs /var/lib",
            "mkdir -m 700 /var/lib/etcd",
            f"mkdir -p {' '.join(config.VOLUMES)}",
            "mount -t tmpfs tmpfs /var/log",
            "mkdir /var/log/pods",
            f"mount --bind {folder}/logs/pods /var/log/pods",
        ]
        lines += [
            f"test ! -e /proc/sys/{name} || mount --bind {folder}/sysctl/{name} /proc/sys/{name}"
            for name in KUBELET_SYSCTLS
        ]
        lines += [
            "ip link set lo up",
            # A kernel may have no dummy links; a pair with both ends here is as good.
            "ip link add node0 type veth peer name node1",
            "ip link set node1 up",
            f"ip address add {config.NODE_ADDRESS}/24 dev node0",
            "ip link set node0 up",
            "ip route add default dev node0",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            # Without this, calls of Services between pods of one bridge time out.
            "test ! -e /proc/sys/net/bridge || echo 1 > /proc/sys/net/bridge/bridge-nf-call-iptables",
        ]
        return "\n".join(lines)

    def _start_gate(self, deadline: float) -> None:
        state = self._running()
        port_file = self.folder / "port"
        command = [sys.executable, "-m", "tools.node.gate", str(state.init_pid), str(port_file)]
        with (self.logs / "gate.log").open("wb") as log:
            self._parts["gate"] = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._wait("gate", lambda: port_file.exists() and port_file.read_text().endswith("\n"), deadline)
        self._write_state(NodeState(state.init_pid, state.started, int(port_file.read_text())))

    def _launch(self, name: str, command: list[str]) -> None:
        with (self.logs / f"{name}.log").open("wb") as log:
            self._parts[name] = subprocess.Popen(
                self._inside_command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment(),
            )

    def _inside(self, name: str, *arguments: str, timeout_s: float = 10.0) -> str:
        program = str(self._programs.get(name) or find_all((name,))[name])
        return _run(self._inside_command([program, *arguments]), timeout_s=timeout_s, env=self._environment())

    def _inside_command(self, command: list[str]) -> list[str]:
        pid = str(self._running().init_pid)
        return ["nsenter", "--target", pid, "--net", "--mount", "--pid", "--uts", "--", *command]

    def _environment(self) -> dict[str, str]:
        # The shim lies beside containerd; a caller's proxies and credentials stay outside.
        folders = {str(path.parent) for path in self._programs.values()}
        path = ":".join(
            [*sorted(folders), "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        )
        return {"PATH": path, "HOME": str(self.folder), "LANG": "C.UTF-8"}

    def _succeeds(self, name: str, *arguments: str) -> bool:
        try:
            self._inside(name, *arguments)
        except NodeError:
            return False
        return True

    def _api_is_ready(self) -> bool:
        try:
            return self.kubectl("get", "--raw=/readyz", timeout_s=10) == "ok"
        except NodeError:
            return False

    def _wait(self, part: str, condition: Callable[[], bool], deadline: float) -> None:
        def holds() -> bool:
            self._check_parts()
            return condition()

        _poll(holds, deadline, f"{part} to be ready")

    def _check_parts(self) -> None:
        ended = [name for name, part in self._parts.items() if part.poll() is not None]
        if ended:
            raise NodeError(f"ended while the node started: {', '.join(ended)}")

    def _write_state(self, state: NodeState) -> None:
        content = {"init_pid": state.init_pid, "started": state.started, "port": state.port}
        self._state_path.write_text(json.dumps(content), encoding="utf-8")

    def _write_files(self, plugins: Path) -> None:
        folder = self.folder
        for name in ("logs/pods", "certificates", "scratch", "cni"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, value in KUBELET_SYSCTLS.items():
            path = folder / "sysctl" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n", encoding="ascii")
        (folder / "resolv.conf").touch()
        (folder / "containerd.toml").write_text(config.containerd_config(folder, plugins), encoding="utf-8")
        network = {
            "cniVersion": "1.0.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isDefaultGateway": True,
                    "hairpinMode": True,
                    # With it the plugin needs iptables.
                    "ipMasq": False,
                    "ipam": {"type": "host-local", "ranges": [[{"subnet": config.POD_RANGE}]]},
                }
            ],
        }
        (folder / "cni" / "10-pods.conflist").write_text(json.dumps(network), encoding="utf-8")
        # JSON is YAML.
        (folder / "kubelet.yaml").write_text(json.dumps(config.kubelet_config(folder)), encoding="utf-8")
        (folder / "proxy.yaml").write_text(json.dumps(config.proxy_config(folder)), encoding="utf-8")

    def _write_certificates(self) -> None:
        folder = self.folder / "certificates"
        _openssl("req", "-x509", "-newkey", "rsa:2048", "-noenc", "-days", "30", "-subj", "/CN=asd-node",
                 "-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.crt"))  # fmt: skip
        addresses = f"IP:127.0.0.1,IP:{config.NODE_ADDRESS},IP:{config.API_SERVICE}"
        names = "DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc"
        _issue(
            folder,
            "apiserver",
            "/CN=kube-apiserver",
            f"{addresses},{names},DNS:kubernetes.default.svc.cluster.local",
        )
        _issue(
            folder,
            "kubelet-server",
            f"/CN={config.NODE_NAME}",
            f"IP:{config.NODE_ADDRESS},DNS:{config.NODE_NAME}",
        )
        _issue(folder, "front-proxy", "/CN=front-proxy")
        users = {
            "admin": "/O=system:masters/CN=admin",
            "kubelet": f"/O=system:nodes/CN=system:node:{config.NODE_NAME}",
            "controller-manager": "/CN=system:kube-controller-manager",
            "scheduler": "/CN=system:kube-scheduler",
            "proxy": "/CN=system:kube-proxy",
        }
        for name, subject in users.items():
            _issue(folder, name, subject)
            inside = f"https://{config.NODE_ADDRESS}:{config.API_PORT}"
            path = self.folder / f"{name}.kubeconfig"
            path.write_text(json.dumps(config.kubeconfig(folder, name, inside)), encoding="utf-8")
        outside = f"https://127.0.0.1:{self._running().port}"
        self.kubeconfig.write_text(json.dumps(config.kubeconfig(folder, "admin", outside)), encoding="utf-8")
        self.kubeconfig.chmod(0o600)

    def _clear(self, *, keep_logs: bool = False) -> None:
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if keep_logs and path == self.logs:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_machine() -> None:
    """Raise MissingProgramError or NodeError, with a sentence, where this machine cannot run a node."""
    check_node()
    images.check()
    _check_alone()
    for parent in cgroup_parents():
        probe = parent / f"asd-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            raise NodeError(
                f"a node makes cgroups, and this machine refuses: {probe}: {error.strerror}"
            ) from error
    # What the node's process 1 does, and containerd for each container.
    script = """
        mount --make-rprivate /
        mount -t proc proc /proc
        mount -t tmpfs tmpfs /run
        mkdir /run/lower /run/upper /run/work /run/merged
        mount -t overlay overlay -o lowerdir=/run/lower,upperdir=/run/upper,workdir=/run/work /run/merged
        ip link add node0 type veth peer name node1
        ip link add cni0 type bridge
        echo 1 > /proc/sys/net/ipv4/ip_forward
        nft add table ip asd
    """
    command = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "sh", "-ec", script]
    try:
        _run(command, timeout_s=30)
    except NodeError as error:
        said = str(error).splitlines()[-1]
        raise NodeError(
            f"a node has namespaces and mounts of its own, and this machine refuses: {said}"
        ) from error
    # Last, for it asks the network: what the tests would build or fetch.
    check_go([*absent_programs((*NODE_PROGRAMS, "jaeger")), *crds.absent_definitions()])


def leftovers(folder: Path) -> list[str]:
    """Return what a node left on the machine; the logs in its folder are not counted."""
    found = [f"cgroup {path}" for path in _cgroups()]
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    found += [f"mount {line.split()[4]}" for line in mounts if str(folder.absolute()) in line]
    links = _run(["ip", "-brief", "link"], timeout_s=10).splitlines()
    found += [f"link {line.split()[0]}" for line in links if line.startswith(("cni0", "node0", "veth"))]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(folder.absolute()) in command and int(process.name) != os.getpid():
                found.append(f"process {process.name}: {command}")
    if folder.exists():
        found += [f"file {path}" for path in folder.iterdir() if path.name != "logs"]
    return found


def _issue(folder: Path, name: str, subject: str, alternatives: str = "") -> None:
    """Write NAME.key and NAME.crt, signed by ca.crt. alternatives: names and addresses of a server."""
    extensions = ["-addext", f"subjectAltName={alternatives}"] if alternatives else []
    _openssl(
        "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "30",
        "-subj", subject, "-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key"),
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-addext", "extendedKeyUsage=serverAuth,clientAuth", *extensions,
        "-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt"),
    )  # fmt: skip


def _openssl(*arguments: str) -> None:
    _run(["openssl", *arguments], timeout_s=30)


def _poll(condition: Callable[[], bool], deadline: float, what: str) -> None:
    while not condition():
        if time.monotonic() > deadline:
            raise NodeError(f"waited too long for {what}")
        time.sleep(0.05)


def _start_time(pid: int) -> str:
    """Return when a process started, in the kernel's ticks; "" where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _cgroups() -> list[Path]:
    """Return the top cgroups of a node that are there, in every hierarchy."""
    parents = [CGROUP_ROOT, *(path for path in CGROUP_ROOT.iterdir() if path.is_dir())]
    return [parent / name for parent in parents for name in CGROUPS if (parent / name).is_dir()]


def cgroup_parents() -> list[Path]:
    """Return where a node's cgroups are made: the one hierarchy of version 2, or those of version 1."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    return [CGROUP_ROOT / name for name in ("cpu", "memory", "pids") if (CGROUP_ROOT / name).is_dir()]


def _busy_cgroups() -> list[Path]:
    found = (path for top in _cgroups() for path in top.rglob("cgroup.procs"))
    return [path.parent for path in found if path.read_text(encoding="ascii").strip()]


def _check_alone() -> None:
    # Two kubelets would remove each other's cgroups.
    if busy := _busy_cgroups():
        raise NodeError(f"another kubelet runs on this machine: {busy[0]} is in use")


def _remove_cgroups(deadline: float) -> None:
    def removed() -> bool:
        for top in _cgroups():
            # Deepest first; one that still has a dying process stays for the next try.
            for path in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()
            with contextlib.suppress(OSError):
                top.rmdir()
        return not _cgroups()

    _poll(removed, deadline, "the node's cgroups to become empty")
