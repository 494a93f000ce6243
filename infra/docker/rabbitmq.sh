#!/bin/sh
# Starts the official RabbitMQ image with our definitions and one user, QUEUE_USER with QUEUE_PASSWORD.
#
# A node that loads definitions makes no default user, so the user is a definition too. It is loaded at every start:
# a password that was changed in .env holds after a restart.
set -eu

case "${QUEUE_USER:?}${QUEUE_PASSWORD:?}" in
*[!A-Za-z0-9._~-]*)
  echo "RABBITMQ_USER and RABBITMQ_PASSWORD stand in a URL: use letters, digits and . _ ~ - only" >&2
  exit 1
  ;;
esac

umask 077
cat >/etc/rabbitmq/definitions.d/20-user.json <<JSON
{
  "users": [{"name": "$QUEUE_USER", "password": "$QUEUE_PASSWORD", "tags": "administrator"}],
  "permissions": [{"user": "$QUEUE_USER", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}]
}
JSON
chown rabbitmq /etc/rabbitmq/definitions.d/20-user.json
umask 022
echo "load_definitions = /etc/rabbitmq/definitions.d" >/etc/rabbitmq/conf.d/60-definitions.conf
unset QUEUE_PASSWORD

exec docker-entrypoint.sh rabbitmq-server
