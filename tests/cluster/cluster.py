"""A real Kubernetes of two nodes on this machine.

Each node is a set of namespaces (network, mount, PID) with its own containerd, kubelet and kube-proxy; the first one
also runs etcd, the control plane and DNS. The first one's kubelet has a certificate of the cluster's CA, the second
one's signs its own. The nodes' links meet in a bridge in a network namespace of its own: nothing listens on the machine
itself. One state folder holds everything; `down` ends what `up` started and leaves nothing.
"""
import json, os, pathlib, shutil, signal, subprocess as sp, time

import binaries

HERE = pathlib.Path(__file__).parent
# What tells apart clusters that run at once. They have the same addresses, each in network namespaces of its own.
TAG = os.environ.get("COUNTERSIGN_CLUSTER", "")
STATE = pathlib.Path(f"/var/lib/countersign-cluster{TAG}")
PREFIX = f"csk{TAG}"
FABRIC = f"{PREFIX}-fabric"
SERVICES, DNS_DOMAIN = "10.91.0.0/16", "cluster.local"
API = "https://10.89.0.1:6443"
CGROUPS = pathlib.Path("/sys/fs/cgroup")
# What the roles of Countersign did at the API server, and what kubelets asked about them: lines of JSON.
AUDIT = STATE / "audit.log"
AUDITED = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": [
    {"level": "Metadata", "userGroups": ["system:serviceaccounts:countersign"]},
    {"level": "Request", "userGroups": ["system:nodes"], "verbs": ["create"],
     "resources": [{"group": "authorization.k8s.io", "resources": ["subjectaccessreviews"]}]},
    {"level": "None"}]}


class Node:
    def __init__(self, number):
        self.number, self.name = number, f"node{number}"
        self.netns, self.ip, self.pods = f"{PREFIX}-node{number}", f"10.89.0.{number}", f"10.90.{number}.0/24"
        self.dir = STATE / self.name
        # As kubeadm, kind and minikube leave it: the second node's kubelet signs its own serving certificate.
        self.verified = number == 1
        # Whether its runtime sees the machine's cgroups of version 2 and gives each container one, beside those of
        # version 1: by it the kernel tells a sidecar from an app.
        self.by_cgroup = number == 2

    def run(self, *command, **options):
        """Runs a command inside all of the node's namespaces."""
        init = (self.dir / "init").read_text()
        return run(["nsenter", "-t", init, "-n", "-m", "-p", "--", *command], **options)

    def stop(self, program):
        """Kills a program and keeps it down."""
        (self.dir / "down" / program).touch()
        self.run("kill", "-9", (self.dir / "pid" / program).read_text().strip())

    def start(self, program):
        (self.dir / "down" / program).unlink()

    def restart(self, program):
        self.run("kill", (self.dir / "pid" / program).read_text().strip())


NODES = [Node(1), Node(2)]


def sh(command, **options):
    return run(["bash", "-c", command], check=True, **options)


def pki():
    p = STATE / "pki"
    p.mkdir(parents=True)
    quiet = {"cwd": p, "stdout": sp.DEVNULL, "stderr": sp.DEVNULL}
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    sh(f"openssl req -x509 {key} -days 30 -keyout ca.key -out ca.crt -subj /CN=test-cluster", **quiet)
    sh("openssl genrsa -out sa.key 2048", **quiet)
    names = {
        "apiserver": ("/CN=kube-apiserver",
                      "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,IP:10.89.0.1,IP:10.91.0.1"),
        "admin": ("/O=system:masters/CN=admin", "DNS:admin"),
        "controller-manager": ("/CN=system:kube-controller-manager", "DNS:controller-manager"),
        "scheduler": ("/CN=system:kube-scheduler", "DNS:scheduler"),
        "kube-proxy": ("/CN=system:kube-proxy", "DNS:kube-proxy"),
        "coredns": ("/CN=coredns", "DNS:coredns"),
        "apiserver-kubelet": ("/O=system:masters/CN=apiserver-kubelet", "DNS:apiserver-kubelet"),
        **{n.name: (f"/O=system:nodes/CN=system:node:{n.name}", f"DNS:{n.name},IP:{n.ip}") for n in NODES},
    }
    for name, (subject, san) in names.items():
        sh(f"openssl req {key} -keyout {name}.key -out {name}.csr -subj {subject} &&"
           f" openssl x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out {name}.crt"
           f" -extfile <(printf 'subjectAltName={san}\\nextendedKeyUsage=serverAuth,clientAuth\\n')", **quiet)
        (p / f"{name}.conf").write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "x",
            "clusters": [{"name": "c", "cluster": {"server": API, "certificate-authority": str(p / "ca.crt")}}],
            "users": [{"name": "u",
                       "user": {"client-certificate": str(p / f"{name}.crt"), "client-key": str(p / f"{name}.key")}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}]}))
    return p


def network():
    sh(f"ip netns add {FABRIC}; ip -n {FABRIC} link add br0 type bridge; ip -n {FABRIC} link set br0 up;"
       f" ip -n {FABRIC} link set lo up")
    for n in NODES:
        sh(f"""ip netns add {n.netns}; ip -n {n.netns} link set lo up
               ip -n {n.netns} link add eth0 type veth peer name {n.name} netns {FABRIC}
               ip -n {FABRIC} link set {n.name} master br0 up
               ip -n {n.netns} addr add {n.ip}/24 dev eth0; ip -n {n.netns} link set eth0 up
               ip -n {n.netns} route add default via {n.ip}""")
        for other in NODES:
            if other is not n:
                sh(f"ip -n {n.netns} route add {other.pods} via {other.ip}")


def programs(n, bins, p):
    """What a node runs, in the order of starting."""
    cgroup = f"/{n.netns}"
    n.dir.mkdir(parents=True)
    (n.dir / "cni.d").mkdir()
    # Of the node's own, where a plugin may be added; the machine's plugins are shown in it.
    (n.dir / "cni-bin").mkdir()
    for plugin in pathlib.Path("/usr/lib/cni").iterdir():
        (n.dir / "cni-bin" / plugin.name).symlink_to(plugin)
    (n.dir / "cni.d" / "10-bridge.conflist").write_text(json.dumps({
        "cniVersion": "0.4.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": n.pods}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": True}}]}))
    (n.dir / "containerd.toml").write_text(f"""version = 2
root = "{n.dir}/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
                    "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "docker.io/countersign-test/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
""")
    (n.dir / "kubelet.yaml").write_text(json.dumps({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True, "cacheTTL": "2s"},
                           "x509": {"clientCAFile": f"{p}/ca.crt"}},
        "authorization": {"mode": "Webhook", "webhook": {"cacheAuthorizedTTL": "2s", "cacheUnauthorizedTTL": "2s"}},
        **({"tlsCertFile": f"{p}/{n.name}.crt", "tlsPrivateKeyFile": f"{p}/{n.name}.key"} if n.verified else {}),
        "cgroupDriver": "cgroupfs", "cgroupRoot": cgroup, "cgroupsPerQOS": True, "enforceNodeAllocatable": [],
        "failCgroupV1": False,
        "failSwapOn": False, "clusterDomain": DNS_DOMAIN, "clusterDNS": ["10.89.0.1"],
        "resolvConf": f"{STATE}/resolv.conf",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock", "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%",
                         "nodefs.inodesFree": "1%"},
        "maxPods": 250, "syncFrequency": "10s", "nodeStatusUpdateFrequency": "4s", "registryPullQPS": 0,
        "kubeAPIQPS": 100, "kubeAPIBurst": 200,
        "podPidsLimit": -1, "serializeImagePulls": False, "localStorageCapacityIsolation": False}))
    control = []
    if n.number == 1:
        (STATE / "Corefile").write_text(f""".:53 {{
    bind {n.ip}
    errors
    kubernetes {DNS_DOMAIN} {{
        kubeconfig {p}/coredns.conf
        pods insecure
        ttl 1
    }}
}}
""")
        control = [
            ["etcd", f"{bins}/etcd", f"--data-dir={n.dir}/etcd", "--listen-client-urls=http://127.0.0.1:2379",
             "--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380",
             "--unsafe-no-fsync"],
            ["kube-apiserver", f"{bins}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443",
             f"--bind-address={n.ip}", f"--advertise-address={n.ip}", f"--client-ca-file={p}/ca.crt",
             f"--tls-cert-file={p}/apiserver.crt", f"--tls-private-key-file={p}/apiserver.key",
             f"--service-account-key-file={p}/sa.key", f"--service-account-signing-key-file={p}/sa.key",
             "--service-account-issuer=https://kubernetes.default.svc", "--authorization-mode=Node,RBAC",
             f"--service-cluster-ip-range={SERVICES}", f"--kubelet-client-certificate={p}/apiserver-kubelet.crt",
             # Without --kubelet-certificate-authority, as kubeadm has it: it would refuse the second node's kubelet.
             f"--kubelet-client-key={p}/apiserver-kubelet.key",
             f"--audit-policy-file={STATE}/audit-policy.json", f"--audit-log-path={AUDIT}", "--audit-log-maxsize=1000",
             "--allow-privileged=true", "--kubelet-preferred-address-types=InternalIP",
             "--enable-admission-plugins=NodeRestriction"],
            ["kube-controller-manager", f"{bins}/kube-controller-manager", f"--kubeconfig={p}/controller-manager.conf",
             "--use-service-account-credentials", f"--service-account-private-key-file={p}/sa.key",
             f"--root-ca-file={p}/ca.crt",
             f"--cluster-signing-cert-file={p}/ca.crt", f"--cluster-signing-key-file={p}/ca.key",
             "--leader-elect=false", "--kube-api-qps=200", "--kube-api-burst=400", "--node-monitor-grace-period=40s"],
            ["kube-scheduler", f"{bins}/kube-scheduler", f"--kubeconfig={p}/scheduler.conf", "--leader-elect=false",
             "--kube-api-qps=200", "--kube-api-burst=400"],
            ["coredns", f"{bins}/coredns", f"-conf={STATE}/Corefile"],
        ]
    return control + [
        ["containerd", "containerd", "-c", str(n.dir / "containerd.toml")],
        ["kubelet", f"{bins}/kubelet", f"--kubeconfig={p}/{n.name}.conf", f"--config={n.dir}/kubelet.yaml",
         f"--hostname-override={n.name}", f"--node-ip={n.ip}"],
        ["kube-proxy", f"{bins}/kube-proxy", f"--kubeconfig={p}/kube-proxy.conf", "--cluster-cidr=10.90.0.0/16",
         f"--hostname-override={n.name}", "--proxy-mode=iptables", "--conntrack-max-per-core=0",
         "--iptables-min-sync-period=100ms"],
    ]


def wait(what, seconds, look):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = look()
        if found:
            return found
        time.sleep(0.2)
    raise SystemExit(f"cluster: {what} did not come within {seconds} s; the logs are in {STATE}/node*/log")


def operators(*command):
    """A command where the cluster's administrator would run it: within reach of the API server, with KUBECONFIG."""
    return ["nsenter", f"--net=/run/netns/{NODES[0].netns}", "env", f"KUBECONFIG={STATE}/pki/admin.conf",
            *map(str, command)]


def kubectl_command(*args):
    """kubectl as the cluster's administrator."""
    return operators(binaries.build() / "kubectl", *args)


def run(command, timeout=300, **options):
    """Runs a command that is killed where it is not done in time: the whole suite would wait with it."""
    return sp.run([*map(str, command)], text=True, timeout=timeout, **options)


def kubectl(*args, check=True, **options):
    """Runs kubectl; its output, or without `check` what became of it."""
    options.setdefault("stdout", sp.PIPE)
    done = run(kubectl_command(*args), stderr=sp.PIPE, **options)
    if check and done.returncode:
        raise RuntimeError(f"kubectl {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout if check else done


def up(images):
    """Brings the cluster up with these image archives loaded on each node."""
    down()
    bins = binaries.build()
    STATE.mkdir(parents=True)
    (STATE / "resolv.conf").write_text("")
    (STATE / "audit-policy.json").write_text(json.dumps(AUDITED))
    p = pki()
    network()
    for n in NODES:
        listed = programs(n, bins, p)
        (n.dir / "programs").write_text("".join("\t".join(words) + "\n" for words in listed))
        for controller in CGROUPS.iterdir():
            if controller.is_dir() and controller.name != "unified":
                group = controller / n.netns
                group.mkdir(exist_ok=True)
                for file in ("cpuset.cpus", "cpuset.mems") if controller.name == "cpuset" else ():
                    (group / file).write_text((controller / file).read_text())
        if not n.by_cgroup:
            (n.dir / "version-1").touch()
        outer = sp.Popen(["nsenter", f"--net=/run/netns/{n.netns}", "unshare", "--mount", "--pid", "--fork",
                          "--kill-child", "--mount-proc",
                          str(HERE / "node"), str(n.dir)], start_new_session=True, stdin=sp.DEVNULL,
                         stdout=open(n.dir / "out", "w"), stderr=sp.STDOUT)
        (n.dir / "outer").write_text(str(outer.pid))
        child = lambda: pathlib.Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        (n.dir / "init").write_text(wait(f"{n.name}'s first process", 10, child)[0])
    for n in NODES:
        wait(f"{n.name}'s containerd", 30,
             lambda n=n: n.run("ctr", "version", stdout=sp.DEVNULL, stderr=sp.DEVNULL).returncode == 0)
        for image in images:
            load(n, image)
    wait("the API server", 60, lambda: kubectl("get", "--raw", "/readyz", check=False).returncode == 0)
    kubectl("create", "clusterrolebinding", "coredns", "--clusterrole=view", "--user=coredns")
    kubectl("create", "clusterrole", "coredns", "--verb=list,watch",
            "--resource=namespaces,endpointslices.discovery.k8s.io,services,pods")
    kubectl("create", "clusterrolebinding", "coredns-more", "--clusterrole=coredns", "--user=coredns")
    ready = lambda: kubectl("get", "nodes", "-o", "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}",
                            check=False).stdout
    wait("both nodes", 90, lambda: ready().split() == ["True"] * len(NODES))


def load(n, image):
    done = n.run("ctr", "-n", "k8s.io", "images", "import", image, stdout=sp.PIPE, stderr=sp.STDOUT)
    if done.returncode:
        raise SystemExit(f"cluster: {n.name} cannot load {image}: {done.stdout}")


def down():
    """Ends every process of the cluster and removes what it made."""
    for n in NODES:
        outer = n.dir / "outer"
        if outer.exists():
            pid = int(outer.read_text())
            # Only a process that is still the one we started: a number may be used again.
            try:
                ours = str(n.dir) in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
                if ours:
                    os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
    for n in NODES:
        groups = [g for c in CGROUPS.glob(f"*/{n.netns}")
                  for g in [*sorted(c.rglob("*/"), key=lambda g: -len(str(g))), c]]
        for _ in range(100):
            groups = [g for g in groups if g.exists() and not removed(g)]
            if not groups:
                break
            time.sleep(0.1)
    for netns in [n.netns for n in NODES] + [FABRIC]:
        if pathlib.Path(f"/run/netns/{netns}").exists():
            sp.run(["ip", "netns", "del", netns], check=False)
    if STATE.exists():
        shutil.rmtree(STATE)


def removed(group):
    try:
        group.rmdir()
        return True
    except OSError:
        return False
