"""Where text comes from, and how a file of it becomes documents.

source         a source as a list of files: local (local_files), of the Hub, known corpora, Python's standard library
catalog        the known public corpora
hf_datasets    what the package `datasets` opens, as a list of files; convert makes arrow files of other kinds
hub_listing    which files a remote source has; cached, so that later starts work offline
download       resumable downloads, verified before use
file_digests   sha256 of local files, each computed once
readers        one file to rows of text; arrow_readers for parquet and arrow, text_encoding for plain text
read_task      what a reader gets: the file or part to read, and the log of what it skips
documents      rows to documents; text_column says which part of a row is the text; cleaning, optional changes
"""
