"""A function as its author would write it: nothing here knows of carrel."""

import os


def handler(event, context):
    print(f"asked by {event.get('name', 'nobody')}")
    return {
        "greeting": f"hello, {event.get('name', 'whoever you are')}",
        "request": context.aws_request_id,
        "milliseconds_left": context.get_remaining_time_in_millis(),
        "kernel": os.uname().release,
    }
