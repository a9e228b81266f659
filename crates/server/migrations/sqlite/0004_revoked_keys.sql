-- Keys of authorities that were revoked, X.509 and JWT, by the SHA-256 of the PKIX public key in hex. The trust bundle never has them again.
CREATE TABLE revoked_keys (
    public_key_sha256 TEXT PRIMARY KEY NOT NULL
) STRICT;
