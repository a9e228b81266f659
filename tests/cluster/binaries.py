"""The cluster's programs, built from their Go modules and kept in the cache by version."""
import contextlib, fcntl, hashlib, os, pathlib, shutil, subprocess as sp, sys, urllib.request, zipfile

HERE = pathlib.Path(__file__).parent
CACHE = pathlib.Path(os.environ.get("COUNTERSIGN_CACHE", "/var/cache/countersign"))
GO = "1.26.8"
COREDNS = "v1.12.4"
HELM = ["v3.22.0", "v4.3.1"]
KUBERNETES = ["kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl"]


def version(module, path):
    line = next(l for l in (HERE / "programs" / module / "go.mod").read_text().splitlines() if f"{path} v" in l
                and "//" not in l)
    return line.split()[-1]


def key():
    """Names one set of binaries: what they are made of."""
    made_of = b"".join((HERE / "programs" / m / "go.sum").read_bytes() for m in ("kubernetes", "etcd"))
    return hashlib.sha256(made_of + COREDNS.encode() + GO.encode() + b"1").hexdigest()[:12]


@contextlib.contextmanager
def alone():
    """Nobody else builds into the cache meanwhile: two runs would remove each other's unfinished work."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting until another run has built what it lacks in {CACHE}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def go():
    """A Go that is new enough: the machine's own, or the toolchain that Go's module proxy serves."""
    have = shutil.which("go")
    if have and tuple(int(n) for n in sp.check_output([have, "env", "GOVERSION"],
                                                      text=True).strip()[2:].split(".")[:2]) >= (1, 24):
        return have
    root = CACHE / f"go-{GO}"
    if not (root / "bin" / "go").exists():
        print(f"getting Go {GO}", flush=True)
        proxy = os.environ.get("GOPROXY", "https://proxy.golang.org").split(",")[0]
        archive = CACHE / "go.zip"
        CACHE.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(f"{proxy}/golang.org/toolchain/@v/v0.0.1-go{GO}.linux-amd64.zip", archive)
        inside, fresh = f"golang.org/toolchain@v0.0.1-go{GO}.linux-amd64/", CACHE / f"go-{GO}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        with zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                to = fresh / name.removeprefix(inside)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(z.read(name))
        for tool in [*(fresh / "bin").iterdir(), *(fresh / "pkg" / "tool").rglob("*")]:
            if tool.is_file():
                tool.chmod(0o755)
        archive.unlink()
        fresh.rename(root)
    return str(root / "bin" / "go")


def build():
    """The folder with all programs; builds what is missing, about 20 minutes on two cores the first time."""
    out = CACHE / f"cluster-{key()}"
    if missing_in(out):
        with alone():
            build_into(out)
    return out


def missing_in(out):
    return [p for p in [*KUBERNETES, "etcd", "coredns"] if not (out / p).exists()]


def build_into(out):
    for old in CACHE.glob("cluster-*"):
        if old != out:
            shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    missing = missing_in(out)
    # Another run may have built them while this one waited.
    if not missing:
        return
    cache = out / "go-build"
    env = {**os.environ, "CGO_ENABLED": "0", "GOCACHE": str(cache), "GOFLAGS": "-trimpath -buildvcs=false",
           "GOTOOLCHAIN": "local", "GOBIN": str(out / "bin")}
    go_ = go()
    k8s = version("kubernetes", "k8s.io/kubernetes")
    major, minor = k8s[1:].split(".")[:2]
    stamp = " ".join(f"-X k8s.io/{p}.{k}={v}" for p in ("component-base/version", "client-go/pkg/version")
                     for k, v in (("gitVersion", k8s), ("gitMajor", major), ("gitMinor", minor),
                                  ("gitTreeState", "clean")))
    # All of one module in one command, so that one program is linked while the next is compiled.
    fresh = out / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    for module, flags, packages in (
        ("kubernetes", f"-s -w {stamp}", {p: f"k8s.io/kubernetes/cmd/{p}" for p in KUBERNETES}),
        ("etcd", "-s -w", {"etcd": "go.etcd.io/etcd/server/v3"}),
    ):
        wanted = [p for p in packages if p in missing]
        if not wanted:
            continue
        print(f"building {', '.join(wanted)}", flush=True)
        target = fresh if len(wanted) > 1 else fresh / wanted[0]
        sp.run([go_, "build", "-ldflags", flags, "-o", str(target), *(packages[p] for p in wanted)],
               cwd=HERE / "programs" / module, env=env, check=True)
        for program in wanted:
            (fresh / program).rename(out / program)
    if "coredns" in missing:
        print("building coredns", flush=True)
        sp.run([go_, "install", "-ldflags", "-s -w", f"github.com/coredns/coredns@{COREDNS}"], cwd=HERE / "programs",
               env=env, check=True)
        (out / "bin" / "coredns").rename(out / "coredns")
    fresh.rmdir()
    sp.run([go_, "clean", "-cache"], env=env, check=False)
    shutil.rmtree(cache, ignore_errors=True)


def helm(version):
    """Helm of this version, built the first time it is asked for."""
    out = CACHE / f"helm-{version}"
    if not (out / "helm").exists():
        with alone():
            build_helm(version, out)
    return out / "helm"


def build_helm(version, out):
    for old in CACHE.glob("helm-*"):
        if old.name.removeprefix("helm-") not in HELM:
            shutil.rmtree(old, ignore_errors=True)
    if not (out / "helm").exists():
        print(f"building helm {version}", flush=True)
        env = {**os.environ, "CGO_ENABLED": "0", "GOCACHE": str(out / "go-build"),
               "GOFLAGS": "-trimpath -buildvcs=false", "GOTOOLCHAIN": "local", "GOBIN": str(out / "bin")}
        sp.run([go(), "install", "-p", "2", "-ldflags", "-s -w",
                f"helm.sh/helm/{version.split('.')[0]}/cmd/helm@{version}"], env=env, check=True)
        shutil.rmtree(out / "go-build", ignore_errors=True)
        (out / "bin" / "helm").rename(out / "helm")


if __name__ == "__main__":
    # Everything that the suite needs and that takes long, ahead of it.
    print(build())
    for each in HELM:
        print(helm(each))
    sys.exit(0)
