//! An upstream CA on disk: what people get wrong, each with the one line that names their own file; and what is simply read.

use std::path::Path;

use crate::support::{able, countersign, outcome, sh};

/// A root, an intermediate below it, and everything that can be wrong with either.
fn files(dir: &Path) {
    sh(&format!(
        r#"cd {dir}
new() {{ openssl ecparam -name prime256v1 -genkey -noout -out "$1.sec1" && openssl pkcs8 -topk8 -nocrypt -in "$1.sec1" -out "$1.key"; }}
ca() {{ # name subject issuer days extensions
  openssl req -new -key "$1.key" -subj "/CN=$2" -out "$1.csr" 2>/dev/null
  printf '%s\n' "$5" > "$1.ext"
  if [ "$3" = self ]; then openssl x509 -req -in "$1.csr" -signkey "$1.key" -days "$4" -extfile "$1.ext" -out "$1.crt" 2>/dev/null
  else openssl x509 -req -in "$1.csr" -CA "$3.crt" -CAkey "$3.key" -CAcreateserial -days "$4" -extfile "$1.ext" -out "$1.crt" 2>/dev/null; fi
}}
CA='basicConstraints=critical,CA:true
keyUsage=critical,keyCertSign,cRLSign
subjectKeyIdentifier=hash'
for n in root inter other leaf short nosign; do new $n; done
ca root Root self 30 "$CA"; ca other Other self 30 "$CA"; ca inter Inter root 20 "$CA"
ca leaf Leaf root 20 'basicConstraints=critical,CA:false'
ca nosign NoSign root 20 'basicConstraints=critical,CA:true
keyUsage=critical,digitalSignature'
ca short Short root 20 'basicConstraints=critical,CA:true,pathlen:0
keyUsage=critical,keyCertSign'
openssl genrsa -traditional -out weak.key 1024 2>/dev/null; ca weak Weak self 30 "$CA"
openssl genrsa -traditional -out rsa.key 2048 2>/dev/null; ca rsa Rsa self 30 "$CA"
openssl req -x509 -key root.key -subj /CN=Old -not_before 20200101000000Z -not_after 20200201000000Z -out old.crt 2>/dev/null || \
  faketime -f '@2020-01-01 00:00:00' openssl req -x509 -key root.key -subj /CN=Old -days 30 -out old.crt 2>/dev/null || true
cat inter.crt root.crt > chain.crt; cat root.crt inter.crt > reversed.crt; cat inter.crt other.crt > strange.crt
printf '\357\273\277' | cat - root.crt > bom.crt; printf '\357\273\277' | cat - root.key > bom.key
sed 's/$/\r/' root.crt > crlf.crt; sed 's/$/\r/' root.key > crlf.key
openssl ecparam -name prime256v1 > params.key; cat root.sec1 >> params.key
openssl pkcs8 -topk8 -in root.key -passout pass:x -out encrypted.key
openssl ec -in root.sec1 -aes128 -passout pass:x -out encrypted-sec1.key 2>/dev/null
openssl x509 -in root.crt -outform der -out der.crt; openssl pkey -in root.key -outform der -out der.key
openssl genpkey -algorithm ed25519 -out ed.key 2>/dev/null; openssl ecparam -name secp521r1 -genkey -noout -out p521.key
openssl pkey -in root.key -pubout -out public.key; : > empty.pem; mkdir folder; echo hello > text.pem
head -n -1 root.crt > cut.crt; sed '2s/^./*/' root.crt > damaged.crt; head -n -1 root.key > cut.key
cat root.key other.key > two.key; mkfifo pipe"#,
        dir = dir.display()
    ));
}

#[test]
fn mistakes_in_upstream_files_name_the_users_own_file() {
    if !able(&["openssl"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    files(dir.path());
    let up = |certificate: &str, key: &str, bundle: Option<&str>| {
        let bundle = bundle.map(|b| format!(", bundle: {b}")).unwrap_or_default();
        let yaml = format!(
            "name: t-upstream\nupstream: {{certificate: {certificate}, key: {key}{bundle}}}\nworkloads:\n  - name: a\n    command: [no-such]\n"
        );
        // The last mistake in the file is the program: whatever comes before it was taken.
        let yaml = yaml.replace("no-such", "sleep");
        std::fs::write(dir.path().join("mesh.yaml"), yaml).unwrap();
        let (code, said) = outcome(&mut countersign(&["up", &dir.path().join("mesh.yaml").display().to_string()]));
        (code, said.replace(&format!("{}/", dir.path().display()), "").trim().to_owned())
    };
    let mut wrong = vec![];
    for (certificate, key, bundle, expected) in [
        // The certificate.
        ("none.crt", "root.key", None, "mesh.yaml:2: certificate: there is no file none.crt"),
        ("folder", "root.key", None, "mesh.yaml:2: certificate: folder is a folder; expected a PEM file"),
        ("pipe", "root.key", None, "mesh.yaml:2: certificate: pipe is not a regular file; expected a PEM file"),
        ("empty.pem", "root.key", None, "empty.pem: expected a certificate as PEM, found an empty file"),
        ("text.pem", "root.key", None, "text.pem: expected a certificate as PEM, found no PEM block"),
        (
            "der.crt",
            "root.key",
            None,
            "der.crt: expected a certificate as PEM, found DER; convert it with `openssl x509 -inform der -in FILE -out FILE.pem`",
        ),
        (
            "root.key",
            "root.key",
            None,
            "root.key: expected a certificate (`-----BEGIN CERTIFICATE-----`), found a private key",
        ),
        (
            "root.csr",
            "root.key",
            None,
            "root.csr: expected a certificate (`-----BEGIN CERTIFICATE-----`), found a signing request",
        ),
        ("cut.crt", "root.key", None, "cut.crt: the file is cut off: a `-----END …-----` line is missing"),
        ("damaged.crt", "root.key", None, "damaged.crt: the text between BEGIN and END is damaged: it is not base64"),
        (
            "leaf.crt",
            "leaf.key",
            Some("root.crt"),
            "leaf.crt: the certificate of `CN=Leaf` cannot be an authority: basicConstraints does not say CA",
        ),
        (
            "nosign.crt",
            "nosign.key",
            Some("root.crt"),
            "nosign.crt: the certificate of `CN=NoSign` cannot be an authority: keyUsage lacks keyCertSign",
        ),
        (
            "short.crt",
            "short.key",
            Some("root.crt"),
            "short.crt: path length: `CN=Short` allows 0 CA certificates below it, and Countersign's own CA needs 1; issue it again with pathlen:1 or without the constraint",
        ),
        ("weak.crt", "weak.key", None, "weak.crt: the RSA key of `CN=Weak` has 1024 bits; expected at least 2048"),
        (
            "reversed.crt",
            "inter.key",
            None,
            "reversed.crt: the certificates are not in order: `CN=Root` is followed by `CN=Inter`, which did not issue it; put the CA that signs for this mesh first, then each one's issuer",
        ),
        (
            "strange.crt",
            "inter.key",
            None,
            "strange.crt: the certificates are not in order: `CN=Inter` is followed by `CN=Other`, which did not issue it; put the CA that signs for this mesh first, then each one's issuer",
        ),
        (
            "inter.crt",
            "inter.key",
            None,
            "inter.crt: the last certificate is not self-signed, so the root is unknown; name the file with the roots as `bundle`",
        ),
        // The key.
        ("root.crt", "none.key", None, "mesh.yaml:2: key: there is no file none.key"),
        ("root.crt", "folder", None, "mesh.yaml:2: key: folder is a folder; expected a PEM file"),
        ("root.crt", "empty.pem", None, "empty.pem: expected a private key as PEM, found an empty file"),
        (
            "root.crt",
            "der.key",
            None,
            "der.key: expected a private key as PEM, found DER; convert it with `openssl pkey -inform der -in FILE -out FILE.pem`",
        ),
        (
            "root.crt",
            "root.crt",
            None,
            "root.crt: expected a private key (`-----BEGIN PRIVATE KEY-----`), found a certificate",
        ),
        (
            "root.crt",
            "public.key",
            None,
            "public.key: expected a private key (`-----BEGIN PRIVATE KEY-----`), found a public key",
        ),
        (
            "root.crt",
            "encrypted.key",
            None,
            "encrypted.key: the key is encrypted; decrypt it with `openssl pkey -in FILE -out PLAIN`",
        ),
        (
            "root.crt",
            "encrypted-sec1.key",
            None,
            "encrypted-sec1.key: the key is encrypted; decrypt it with `openssl pkey -in FILE -out PLAIN`",
        ),
        ("root.crt", "cut.key", None, "cut.key: the file is cut off: a `-----END …-----` line is missing"),
        ("root.crt", "two.key", None, "two.key: expected one private key, found several"),
        (
            "root.crt",
            "p521.key",
            None,
            "p521.key: this key cannot be used; use EC P-256, EC P-384, or RSA of 2048 to 8192 bits",
        ),
        (
            "root.crt",
            "other.key",
            None,
            "root.crt: the authority's certificate cannot be used: the private key does not belong to the certificate (key: other.key)",
        ),
        // The bundle.
        ("inter.crt", "inter.key", Some("empty.pem"), "empty.pem: expected a certificate as PEM, found an empty file"),
        (
            "inter.crt",
            "inter.key",
            Some("leaf.crt"),
            "leaf.crt: the certificate of `CN=Leaf` cannot be an authority: basicConstraints does not say CA",
        ),
    ] {
        let (code, said) = up(certificate, key, bundle);
        if (code, said.as_str()) != (2, format!("countersign: {expected}").as_str()) {
            wrong.push(format!("{certificate} {key} {bundle:?}: {code}\n  said:     {said}\n  expected: {expected}"));
        }
    }
    if dir.path().join("old.crt").exists() {
        let (code, said) = up("old.crt", "root.key", None);
        if code != 2 || !said.starts_with("countersign: old.crt: the CA certificate `CN=Old` expired at 2020-") {
            wrong.push(format!("old.crt: {code} {said}"));
        }
    }
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
}
