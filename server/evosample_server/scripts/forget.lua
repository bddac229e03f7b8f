-- The last step of a deletion: drops the tombstone and what remains beside it.
-- KEYS: head, other keys ... ARGV: uid.
local h = redis.call('HMGET', KEYS[1], 'uid', 'birth_uid')
if not h[1] and h[2] == ARGV[1] then
  redis.call('DEL', unpack(KEYS))
end
