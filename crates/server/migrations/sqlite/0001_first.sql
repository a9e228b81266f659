CREATE TABLE entries (
    id        TEXT PRIMARY KEY NOT NULL,
    spiffe_id TEXT NOT NULL,
    parent_id TEXT NOT NULL,
    body      BLOB NOT NULL
) STRICT;

CREATE TABLE agents (
    spiffe_id TEXT PRIMARY KEY NOT NULL,
    body      TEXT NOT NULL
) STRICT;

CREATE TABLE join_tokens (
    token      TEXT PRIMARY KEY NOT NULL,
    expires_at INTEGER NOT NULL,
    agent_id   TEXT
) STRICT;

CREATE TABLE bundles (
    trust_domain TEXT PRIMARY KEY NOT NULL,
    body         BLOB NOT NULL
) STRICT;

CREATE TABLE authorities (
    id          TEXT PRIMARY KEY NOT NULL,
    position    INTEGER NOT NULL,
    status      TEXT NOT NULL,
    key_name    TEXT NOT NULL,
    certificate BLOB NOT NULL,
    chain       BLOB NOT NULL
) STRICT;
