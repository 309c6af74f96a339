"""Storage: the bytes of adapters and banks, in a folder (`local`) or an S3 bucket (`s3`), one Protocol (`objects`).

`revisions` is what the rest of the server sees. The folder knows no names and no tenants.
"""
