"""The bytes of files: in a local folder, or in S3 and what speaks like it. Knows keys, not who owns what."""
