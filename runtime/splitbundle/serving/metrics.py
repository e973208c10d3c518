"""The metrics of a stage server in Prometheus' text form. They hold no content, and no names of clients."""

from __future__ import annotations

from splitbundle.serving.stage_service import StageService

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(service: StageService) -> str:
    """Return the metrics of a server.

    The form is https://prometheus.io/docs/instrumenting/exposition_formats.
    """
    limits, sessions, training = service.offer.limits, service.sessions, service.training
    lines: list[str] = []

    def add(name: str, kind: str, help_text: str, values: dict[str, float]) -> None:
        full = f"splitbundle_stage_{name}"
        lines.append(f"# HELP {full} {help_text}")
        lines.append(f"# TYPE {full} {kind}")
        lines.extend(f"{full}{labels} {value:.10g}" for labels, value in values.items())

    counts = {
        f'{{op="{op}",result="{result}"}}': float(number) for (op, result), number in sorted(service.counts.items())
    }
    add("requests_total", "counter", "Requests by kind, and ok or the code of the error.", counts)
    add("tokens_total", "counter", "Tokens that were computed.", {"": service.tokens})
    add("compute_seconds_total", "counter", "Seconds that the stage computed.", {"": service.computed_seconds})
    add("queue_seconds_total", "counter", "Seconds that requests waited for the stage.", {"": service.queued_seconds})
    add("shared_calls_total", "counter", "Calls of the cache that sessions share.", {"": service.steps.calls})
    add("shared_call_rows_total", "counter", "Rows of these calls.", {"": service.steps.call_rows})
    lines += service.step_seconds.lines(
        "splitbundle_stage_step_seconds", "Seconds of a step, with its time in the queue."
    )
    add("waiting", "gauge", "Requests that wait for the stage.", {"": service.waiting})
    add("sessions", "gauge", "Sessions that live.", {"": len(sessions)})
    add("sessions_limit", "gauge", "The most sessions.", {"": limits.sessions})
    add("slots", "gauge", "Slots that sessions have reserved.", {"": sessions.slots})
    add("slots_limit", "gauge", "The most slots.", {"": limits.slots})
    add("expired_total", "counter", "Sessions whose lease ran out.", {"": sessions.expired})
    add("draining", "gauge", "1 when the server takes nothing new.", {"": float(service.draining)})
    if training is not None:
        add("training_steps", "gauge", "The last training step that was made.", {"": training.number})
        add("tickets", "gauge", "Forward calls that wait for a gradient.", {"": training.tickets})
    return "\n".join(lines) + "\n"
