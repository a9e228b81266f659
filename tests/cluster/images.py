"""The images that the suite runs: Countersign's own, a pause container, and a box of this machine's own unmodified
programs."""
import os, pathlib, shutil, subprocess as sp, sys, tempfile

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "images"))
import oci  # noqa: E402

COUNTERSIGN = "docker.io/countersign/countersign:test"
BOX = "docker.io/countersign-test/box:1"
PROGRAMS = ["bash", "sh", "cat", "ls", "sleep", "env", "id", "head", "tail", "sha256sum", "dd", "mkdir", "date",
            "true", "seq", "kill", "touch", "grep",
            "curl", "nginx", "redis-server", "redis-cli", "redis-benchmark", "python3"]
PAUSE = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


def pause(out):
    with tempfile.TemporaryDirectory() as d:
        (pathlib.Path(d) / "pause.c").write_text(PAUSE)
        sp.run(["cc", "-static", "-Os", "-s", "-o", f"{d}/pause", f"{d}/pause.c"], check=True)
        layer = oci.tar([("pause", (pathlib.Path(d) / "pause").read_bytes(), 0o755)])
    out.write_bytes(oci.archive("docker.io/countersign-test/pause:1", layer,
                                {"Entrypoint": ["/pause"], "User": "65535:65535"}))


def closure(paths):
    """Files with the libraries that they load, and links as they stand."""
    files, libraries = {}, set()
    for path in paths:
        told = sp.run(["ldd", path], capture_output=True, text=True).stdout
        libraries.update(w for line in told.splitlines() for w in line.split() if w.startswith("/"))
    for path in [*map(str, paths), *libraries]:
        files[path] = pathlib.Path(path).resolve().read_bytes()
    return files


def box(out):
    """Debian's programs with their libraries, and Python's standard library: about 60 MB, rebuilt in seconds."""
    postgres = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    found = [pathlib.Path(shutil.which(p, path="/usr/bin:/bin:/usr/sbin:/sbin")) for p in PROGRAMS]
    found += [postgres / p for p in ("postgres", "initdb", "psql", "pgbench")]
    files = closure(found)
    for library in pathlib.Path("/usr/lib").glob("python3*/lib-dynload/*.so"):
        files.update(closure([library]))
    for tree in [*pathlib.Path("/usr/lib").glob("python3.[0-9]*"), postgres.parent,
                 pathlib.Path("/usr/share/postgresql"), pathlib.Path("/etc/nginx")]:
        skip = {"__pycache__", "test", "tests", "idlelib", "lib2to3", "bitcode", "dist-packages"}
        for file in tree.rglob("*"):
            if file.is_file() and not skip.intersection(file.parts):
                files[str(file)] = file.read_bytes()
    for name in ("libnss_files.so.2", "libnss_dns.so.2"):
        files.update({str(p): p.read_bytes() for p in pathlib.Path("/lib/x86_64-linux-gnu").glob(name)})
    users = "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\napp:x:1000:1000:app:/tmp:/bin/sh\n"
    files.update({"/etc/passwd": users.encode(), "/etc/group": b"root:x:0:\nnogroup:x:65534:\napp:x:1000:\n",
                  "/etc/nsswitch.conf": b"hosts: files dns\n"})
    usr = lambda path: "usr" + path if path.startswith(("/bin/", "/sbin/", "/lib/", "/lib64/")) else path.lstrip("/")
    placed = {usr(path): data for path, data in files.items()}
    folders = {"/".join(p.split("/")[:i]) for p in placed for i in range(1, p.count("/") + 1)} | {
        "tmp", "run", "var", "var/log", "var/log/nginx", "var/lib", "var/lib/nginx"}
    links = [(n, f"usr/{n}", 0o777) for n in ("bin", "sbin", "lib", "lib64")]
    entries = [(f, None, 0o1777 if f in ("tmp", "run", "var/log/nginx", "var/lib/nginx") else 0o755)
               for f in sorted(folders)]
    entries += links + [(p, placed[p], 0o755 if "/bin/" in f"/{p}" or ".so" in p or "sbin/" in p else 0o644)
                        for p in sorted(placed)]
    out.write_bytes(oci.archive(BOX, oci.tar(entries), {"Env": ["PATH=/usr/bin:/usr/sbin:" + str(postgres)],
                                                        "Cmd": ["/bin/sleep", "infinity"]}, 1))


def archives(folder):
    """Where `build` puts the images."""
    return [folder / f"{name}.tar" for name in ("pause", "box", "countersign")]


def build(folder):
    """All images as archives in a folder. Countersign's holds $COUNTERSIGN_BINARY, a static one, or a release build."""
    folder.mkdir(parents=True, exist_ok=True)
    out = archives(folder)
    pause(out[0])
    box(out[1])
    built = os.environ.get("COUNTERSIGN_BINARY")
    sp.run([str(ROOT / "images" / "build"), *(["--binary", built] if built else []), "--name", COUNTERSIGN,
            str(out[2])], check=True)
    return out
