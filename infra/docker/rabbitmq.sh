#!/bin/sh
# Starts the official RabbitMQ image with our definitions, our users with the passwords of the environment, and the
# management API, by which controllers make the users of versions.
#
# A node that loads definitions makes no default user. They are loaded at every start: a password that was changed in
# .env holds after a restart.
set -eu

for password in "${OPERATOR_PASSWORD:?}" "${API_PASSWORD:?}" "${CONTROLLER_PASSWORD:?}" "${SIDECAR_PASSWORD:?}"; do
  case "$password" in
  *[!A-Za-z0-9._~-]*)
    echo "the passwords stand in URLs: use letters, digits and . _ ~ - only" >&2
    exit 1
    ;;
  esac
done

umask 077
sed -e "s/\"OPERATOR_PASSWORD\"/\"$OPERATOR_PASSWORD\"/" -e "s/\"API_PASSWORD\"/\"$API_PASSWORD\"/" \
  -e "s/\"CONTROLLER_PASSWORD\"/\"$CONTROLLER_PASSWORD\"/" -e "s/\"SIDECAR_PASSWORD\"/\"$SIDECAR_PASSWORD\"/" \
  /usr/local/etc/fnqueue-users.json >/etc/rabbitmq/definitions.d/20-users.json
chown rabbitmq /etc/rabbitmq/definitions.d/20-users.json
umask 022
echo "load_definitions = /etc/rabbitmq/definitions.d" >/etc/rabbitmq/conf.d/60-definitions.conf
rabbitmq-plugins enable --offline rabbitmq_management
unset OPERATOR_PASSWORD API_PASSWORD CONTROLLER_PASSWORD SIDECAR_PASSWORD

exec docker-entrypoint.sh rabbitmq-server
