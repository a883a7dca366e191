"""Starting runs: folders, identities, ranks, exit codes."""
