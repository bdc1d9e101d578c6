"""The chart, rendered: no cluster, no sockets."""
