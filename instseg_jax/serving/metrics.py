"""The counts and times that the server shows to Prometheus."""

import prometheus_client as prometheus

CONTENT_TYPE_LATEST = prometheus.CONTENT_TYPE_LATEST


class Metrics:
    """What /metrics shows; a registry of its own, so that several apps can be in one process."""

    def __init__(self) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
        about = "Requests by the status of their answer"
        self.requests = prometheus.Counter("instseg_requests", about, ["status"], registry=registry)
        about = "Seconds from a request to its answer"
        self.seconds = prometheus.Histogram("instseg_request_seconds", about, buckets=seconds, registry=registry)
        about = "Seconds of a batch: decoding, network and masks"
        self.batch_seconds = prometheus.Histogram("instseg_batch_seconds", about, buckets=seconds, registry=registry)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.batch_size = prometheus.Histogram("instseg_batch_size", "Images a batch", buckets=sizes, registry=registry)
        self.instances = prometheus.Counter("instseg_instances", "Instances found", registry=registry)
        self.active = prometheus.Gauge("instseg_active_requests", "Requests being worked on", registry=registry)
        self.waiting = prometheus.Gauge("instseg_waiting_images", "Images waiting for a batch", registry=registry)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return prometheus.generate_latest(self.registry)
