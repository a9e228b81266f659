"""Container images without Docker: a tar of files becomes an OCI archive. The same files give the same bytes."""
import gzip, hashlib, io, json, platform, tarfile

ARCH = {"x86_64": "amd64", "aarch64": "arm64"}


def tar(files):
    """A tar of (name, content, mode) that depends on nothing else: bytes make a file, None a folder, a string a link to
    it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as t:
        for name, data, mode in files:
            entry = tarfile.TarInfo(name)
            entry.mode = mode
            if data is None:
                entry.type = tarfile.DIRTYPE
            elif isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
            else:
                entry.size = len(data)
            t.addfile(entry, io.BytesIO(data) if isinstance(data, bytes) else None)
    return out.getvalue()


def archive(name, layer, config, compression=9):
    """An OCI archive of one layer (a tar) that registers as NAME:TAG; `config` is the image's own, as OCI spells it."""
    packed = gzip.compress(layer, compression, mtime=0)
    digest = lambda data: "sha256:" + hashlib.sha256(data).hexdigest()
    compact = lambda value: json.dumps(value, separators=(",", ":"), sort_keys=True).encode()
    config = compact({"architecture": ARCH[platform.machine()], "os": "linux", "config": config,
                      "rootfs": {"type": "layers", "diff_ids": [digest(layer)]}})
    media = "application/vnd.oci.image."
    part = lambda kind, data: {"mediaType": media + kind, "digest": digest(data), "size": len(data)}
    manifest = compact({"schemaVersion": 2, "mediaType": media + "manifest.v1+json",
                        "config": part("config.v1+json", config), "layers": [part("layer.v1.tar+gzip", packed)]})
    named = part("manifest.v1+json", manifest)
    named["annotations"] = {"io.containerd.image.name": name,
                            "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1]}
    index = compact({"schemaVersion": 2, "mediaType": media + "index.v1+json", "manifests": [named]})
    blobs = sorted((digest(b).replace("sha256:", "blobs/sha256/"), b, 0o644) for b in (packed, config, manifest))
    return tar([("blobs", None, 0o755), ("blobs/sha256", None, 0o755), *blobs, ("index.json", index, 0o644),
                ("oci-layout", compact({"imageLayoutVersion": "1.0.0"}), 0o644)])
