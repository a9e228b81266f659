-- Federation relationships. An endpoint without an ID is authenticated by the Web PKI (https_web).
CREATE TABLE relationships (
    trust_domain TEXT PRIMARY KEY NOT NULL,
    url          TEXT NOT NULL,
    endpoint_id  TEXT,
    version      INTEGER NOT NULL
) STRICT;
