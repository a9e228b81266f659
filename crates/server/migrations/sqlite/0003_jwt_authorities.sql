-- Our own JWT authorities. Their positions and those of `authorities` are of one journal.
CREATE TABLE jwt_authorities (
    id         TEXT PRIMARY KEY NOT NULL,
    position   INTEGER NOT NULL,
    status     TEXT NOT NULL,
    key_name   TEXT NOT NULL,
    public_key BLOB NOT NULL,
    not_before INTEGER NOT NULL,
    not_after  INTEGER NOT NULL
) STRICT;
