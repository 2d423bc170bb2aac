"""What mode `auto` goes by: the ladder of modes and the curve of what labels buy."""
