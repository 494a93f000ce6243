"""Queue on RabbitMQ: a quorum queue per version, publisher confirms, dead letters for all versions in one place.

Connections and topology go through aio-pika. Messages go through the aiormq channel underneath: what aio-pika adds
there (channels that cache state, a task more per delivery, publishes that hang while the broker is away) is what has
to be different here.

Limits and dead-lettering are policies on `^fnq\\.v\\.` (infra/rabbitmq/definitions.json), never declare arguments: a
changed argument would make every later declare fail.
"""
