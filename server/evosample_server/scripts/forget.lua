-- The last step of a deletion: drops the tombstone and what remains beside it.
-- KEYS: head, other keys ... ARGV: uid.
if redis.call('HGET', KEYS[1], 'deleted_uid') == ARGV[1] then
  redis.call('DEL', unpack(KEYS))
end
