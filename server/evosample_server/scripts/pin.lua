-- Keeps an epoch under a name, or lets go of what the name keeps.
-- KEYS: head, epochs, pins. ARGV: uid, name, epoch ('' to let go), most names
-- Returns 'ok', 'gone', 'not_retained' or 'too_many'.
if redis.call('HGET', KEYS[1], 'uid') ~= ARGV[1] then
  return 'gone'
end
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[3], ARGV[2])
  return 'ok'
end
if redis.call('HEXISTS', KEYS[2], ARGV[3]) == 0 then
  return 'not_retained'
end
if redis.call('HEXISTS', KEYS[3], ARGV[2]) == 0 and redis.call('HLEN', KEYS[3]) >= tonumber(ARGV[4]) then
  return 'too_many'
end
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3])
return 'ok'
