-- A version for each row that is read, changed and written back: who writes names the version that was read, and a row
-- that somebody else has changed in the meantime is not overwritten.
ALTER TABLE agents  ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entries ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
ALTER TABLE bundles ADD COLUMN version INTEGER NOT NULL DEFAULT 0;

-- A ban holds for the evidence that a node attested with, under whatever ID it comes back.
ALTER TABLE agents ADD COLUMN banned   INTEGER NOT NULL DEFAULT 0;
ALTER TABLE agents ADD COLUMN evidence TEXT;
UPDATE agents SET banned = COALESCE(json_extract(body, '$.banned'), 0);
CREATE INDEX agents_evidence ON agents (evidence) WHERE evidence IS NOT NULL;

-- What is true of the store as a whole: whose trust domain it is, which version the journal of authorities has.
CREATE TABLE facts (
    name  TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) STRICT;
