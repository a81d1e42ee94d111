"""Where text comes from: files, the Hub, known corpora; read into documents, one row at a time."""
